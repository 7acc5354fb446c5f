#include "registry_cases.h"

#include <cuda_runtime_api.h>

#include <cmath>
#include <cstring>
#include <fstream>
#include <memory>

namespace {

using nvinfer1::DataType;
using nvinfer1::IPluginV3;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorRTPhase;
using test::expect;

void cuda(cudaError_t error, const char* what) {
    if (error != cudaSuccess) expect(false, std::string(what) + ": " + cudaGetErrorString(error));
}

struct Array {
    nvinfer1::Dims dims{};
    DataType type = DataType::kFLOAT;
    std::vector<char> bytes;
};

struct Case {
    std::string name;
    int32_t attributes[4];  // num_heads, num_kv_heads, head_dim, rotary_dim
    float epsilon;
    std::vector<Array> inputs;
    Array expected[2], bounds[2];  // float32, of output and present_state
};

// The format is described in tests/support/makers/tensorrt_cases.py.
class Reader {
public:
    explicit Reader(const char* path) : file_(path, std::ios::binary) {
        char magic[8];
        raw(magic, sizeof magic);
        expect(std::memcmp(magic, "DJCASES1", 8) == 0, std::string(path) + " holds recorded cases");
    }

    std::vector<Case> cases() {
        std::vector<Case> read(number<int32_t>());
        for (Case& one : read) {
            one.name.resize(number<int32_t>());
            raw(one.name.data(), one.name.size());
            raw(one.attributes, sizeof one.attributes);
            one.epsilon = number<float>();
            one.inputs.resize(number<int32_t>());
            for (Array& input : one.inputs) input = array();
            for (int32_t i = 0; i < 2; ++i) {
                one.expected[i] = array();
                one.bounds[i] = array();
            }
        }
        return read;
    }

private:
    void raw(void* to, size_t size) {
        if (!file_.read(static_cast<char*>(to), static_cast<std::streamsize>(size)))
            expect(false, "the file ends early");
    }

    template <typename Number>
    Number number() {
        Number value;
        raw(&value, sizeof value);
        return value;
    }

    Array array() {
        constexpr DataType kTypes[] = {DataType::kFLOAT, DataType::kHALF, DataType::kBF16, DataType::kINT32};
        Array read;
        const int32_t type = number<int32_t>();
        read.type = kTypes[type];
        read.dims.nbDims = number<int32_t>();
        size_t size = type == 1 || type == 2 ? 2 : 4;
        for (int32_t i = 0; i < read.dims.nbDims; ++i) {
            read.dims.d[i] = number<int64_t>();
            size *= static_cast<size_t>(read.dims.d[i]);
        }
        read.bytes.resize(size);
        raw(read.bytes.data(), size);
        return read;
    }

    std::ifstream file_;
};

// Device memory with a canary behind it.
class Memory {
public:
    explicit Memory(size_t size) : size_(size) {
        cuda(cudaMalloc(&data_, size + kCanary), "cudaMalloc");
        cuda(cudaMemset(data_, 0xFF, size + kCanary), "cudaMemset");  // NaN in every type
    }
    explicit Memory(const std::vector<char>& bytes) : Memory(bytes.size()) { set(bytes); }
    ~Memory() { cudaFree(data_); }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;

    void set(const std::vector<char>& bytes) {
        cuda(cudaMemcpy(data_, bytes.data(), bytes.size(), cudaMemcpyHostToDevice), "cudaMemcpy");
    }
    void poison() { cuda(cudaMemset(data_, 0xFF, size_), "cudaMemset"); }
    std::vector<char> get() const {
        std::vector<char> bytes(size_ + kCanary);
        cuda(cudaMemcpy(bytes.data(), data_, bytes.size(), cudaMemcpyDeviceToHost), "cudaMemcpy");
        for (size_t i = size_; i < bytes.size(); ++i) {
            if (static_cast<unsigned char>(bytes[i]) != 0xFF)
                expect(false, "nothing is written behind a buffer");
        }
        bytes.resize(size_);
        return bytes;
    }
    void* data() const { return data_; }

private:
    static constexpr size_t kCanary = 4096;
    void* data_ = nullptr;
    size_t size_;
};

float half_to_float(uint16_t bits) {
    const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
    const float sign = (bits & 0x8000) != 0 ? -1.0f : 1.0f;
    if (exponent == 31) return mantissa != 0 ? NAN : sign * INFINITY;
    return sign * (exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                 : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25));
}

float element(const std::vector<char>& bytes, DataType type, size_t at) {
    if (type == DataType::kFLOAT) {
        float value;
        std::memcpy(&value, &bytes[4 * at], 4);
        return value;
    }
    uint16_t bits;
    std::memcpy(&bits, &bytes[2 * at], 2);
    if (type == DataType::kHALF) return half_to_float(bits);
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

// The largest error in units of its bound; what a NaN or an inexact zero is compared with is infinite.
double worst(const std::vector<char>& got, DataType type, const Array& expected, const Array& bound) {
    double most = 0.0;
    for (size_t i = 0; i < expected.bytes.size() / 4; ++i) {
        const double error = std::abs(
            static_cast<double>(element(got, type, i)) - element(expected.bytes, DataType::kFLOAT, i));
        const double allowed = element(bound.bytes, DataType::kFLOAT, i);
        if (error == 0.0) continue;
        const double ratio = error / allowed;
        if (!(ratio <= most)) most = std::isnan(ratio) ? INFINITY : ratio;
    }
    return most;
}

// One execution context: a plugin attached to it, and memory of its own.
struct Session {
    Session(IPluginV3* plugin, const Case& from, size_t workspace_size)
        : data(from),
          attached(test::runtime_of(plugin)->attachToContext(&context)),
          workspace(workspace_size),
          output(from.expected[0].bytes.size() / (from.inputs[0].type == DataType::kFLOAT ? 1 : 2)),
          present(from.expected[1].bytes.size()) {
        expect(attached != nullptr, "attach to a context");
        for (const Array& input : data.inputs) {
            memory.push_back(std::make_unique<Memory>(input.bytes));
            in.push_back(describe(input.dims, input.type));
        }
        out[0] = describe(data.expected[0].dims, data.inputs[0].type);
        out[1] = describe(data.expected[1].dims, DataType::kFLOAT);
        cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
        runtime = test::runtime_of(attached.get());
        const int32_t inputs = static_cast<int32_t>(in.size());
        expect(runtime->onShapeChange(in.data(), inputs, out, 2) == 0, "onShapeChange");
    }
    ~Session() { cudaStreamDestroy(stream); }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;

    static PluginTensorDesc describe(const nvinfer1::Dims& dims, DataType type) {
        PluginTensorDesc made{};
        made.dims = dims;
        made.type = type;
        made.format = nvinfer1::TensorFormat::kLINEAR;
        made.scale = 1.0f;
        return made;
    }

    // in_place: past and present in one buffer.
    int32_t enqueue(bool in_place) {
        std::vector<const void*> pointers;
        for (const auto& each : memory) pointers.push_back(each->data());
        if (in_place) pointers[2] = present.data();
        void* results[2] = {output.data(), present.data()};
        return runtime->enqueue(in.data(), out, pointers.data(), results, workspace.data(), stream);
    }

    void poison(bool in_place) {
        workspace.poison();
        output.poison();
        if (in_place)
            present.set(data.inputs[2].bytes);
        else
            present.poison();
        cuda(cudaDeviceSynchronize(), "prepare");
    }

    void check(const std::string& how) {
        cuda(cudaStreamSynchronize(stream), how.c_str());
        const double o = worst(output.get(), data.inputs[0].type, data.expected[0], data.bounds[0]);
        const double s = worst(present.get(), DataType::kFLOAT, data.expected[1], data.bounds[1]);
        for (size_t i = 0; i < memory.size(); ++i) {
            if (memory[i]->get() != data.inputs[i].bytes)
                expect(false, "input " + std::to_string(i) + " is unchanged");
        }
        workspace.get();
        char text[200];
        std::snprintf(text, sizeof text, "%s, %s: output %.3f, state %.3f of the bound", data.name.c_str(),
            how.c_str(), o, s);
        expect(o <= 1.0 && s <= 1.0, text);
    }

    const Case& data;
    test::Context context;
    std::unique_ptr<IPluginV3> attached;  // goes before the context
    nvinfer1::IPluginV3OneRuntime* runtime = nullptr;
    Memory workspace, output, present;
    std::vector<std::unique_ptr<Memory>> memory;
    std::vector<PluginTensorDesc> in;
    PluginTensorDesc out[2];
    cudaStream_t stream = nullptr;
};

// From a node to a plan's plugin, with profiles up to twice the case's batch and length.
std::unique_ptr<IPluginV3> plan_plugin(
    nvinfer1::IPluginCreatorV3One& creator, const Case& data, size_t& workspace) {
    const char* names[] = {"num_heads", "num_kv_heads", "head_dim", "rotary_dim"};
    std::vector<PluginField> fields;
    for (int32_t i = 0; i < 4; ++i)
        fields.emplace_back(names[i], &data.attributes[i], PluginFieldType::kINT32, 1);
    fields.emplace_back("epsilon", &data.epsilon, PluginFieldType::kFLOAT32, 1);
    const PluginFieldCollection node{static_cast<int32_t>(fields.size()), fields.data()};
    const std::unique_ptr<IPluginV3> built(creator.createPlugin("layer0", &node, TensorRTPhase::kBUILD));
    expect(built != nullptr, data.name + ": create");

    const int32_t inputs = static_cast<int32_t>(data.inputs.size());
    std::vector<nvinfer1::DynamicPluginTensorDesc> all(inputs + 2);
    for (int32_t i = 0; i < inputs + 2; ++i) {
        const bool result = i >= inputs;
        const bool is_t = i < 2 || i == inputs;
        auto& at = all[i];
        at.desc = Session::describe(
            result ? data.expected[i - inputs].dims : data.inputs[i].dims, is_t     ? data.inputs[0].type
                                                                           : result ? DataType::kFLOAT
                                                                                    : data.inputs[i].type);
        at.min = at.opt = at.max = at.desc.dims;
        if (i > 4 && !result) continue;  // weights
        at.max.d[0] *= 2;
        at.desc.dims.d[0] = -1;
        if (is_t && at.max.d[1] > 1) {
            at.max.d[1] *= 2;
            at.desc.dims.d[1] = -1;
        }
    }
    auto* build = test::build_of(built.get());
    for (int32_t i = 0; i < inputs + 2; ++i) {
        expect(build->supportsFormatCombination(i, all.data(), inputs, 2),
            "tensor " + std::to_string(i) + " fits");
    }
    expect(build->configurePlugin(all.data(), inputs, &all[inputs], 2) == 0, "configure");
    workspace = build->getWorkspaceSize(all.data(), inputs, &all[inputs], 2);
    const PluginFieldCollection* kept = test::runtime_of(built.get())->getFieldsToSerialize();
    std::unique_ptr<IPluginV3> rebuilt(creator.createPlugin("layer0", kept, TensorRTPhase::kRUNTIME));
    expect(rebuilt != nullptr, "rebuild");
    return rebuilt;
}

void capture(Session& session) {
    session.poison(true);
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    cuda(cudaStreamBeginCapture(session.stream, cudaStreamCaptureModeGlobal), "begin capture");
    expect(session.enqueue(true) == 0, "enqueue while a graph is captured");
    cuda(cudaStreamEndCapture(session.stream, &graph), "end capture");
    cuda(cudaGraphInstantiate(&executable, graph, 0), "instantiate");
    for (int32_t i = 0; i < 2; ++i) {
        session.poison(true);
        cuda(cudaGraphLaunch(executable, session.stream), "launch");
        session.check(i == 0 ? "from a graph, in place" : "from the graph again");
    }
    cudaGraphExecDestroy(executable);
    cudaGraphDestroy(graph);
}

void run_case(nvinfer1::IPluginCreatorV3One& creator, const Case& data, test::Logger& logger) {
    size_t workspace = 0;
    std::unique_ptr<IPluginV3> plan = plan_plugin(creator, data, workspace);
    Session one(plan.get(), data, workspace), two(plan.get(), data, workspace);
    plan.reset();  // TensorRT may destroy what contexts were attached from
    for (const bool in_place : {false, true}) {
        one.poison(in_place);
        expect(one.enqueue(in_place) == 0, "enqueue");
        one.check(in_place ? "in place" : "out of place");
    }
    one.poison(false);
    two.poison(false);
    bool right = true;
    for (int32_t i = 0; i < 20; ++i) right = right && one.enqueue(false) == 0 && two.enqueue(false) == 0;
    expect(right, "enqueue in two contexts");
    one.check("two contexts, the first");
    two.check("two contexts, the second");
    capture(one);

    one.in[1].dims.d[2] -= 1;
    logger.forget();
    expect(one.enqueue(false) != 0 && logger.said("input 1 (gate)"), "a wrong shape is refused by enqueue");
    expect(one.context.recorder.getNbErrors() == 1, "and recorded in the context's error recorder");
}

}  // namespace

void run_cases(nvinfer1::IPluginCreatorV3One& creator, const char* path, test::Logger& logger) {
    const std::vector<Case> cases = Reader(path).cases();
    expect(!cases.empty(), std::to_string(cases.size()) + " cases");
    for (const Case& data : cases) run_case(creator, data, logger);
    cuda(cudaDeviceSynchronize(), "the end");
}
