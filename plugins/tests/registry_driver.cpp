// Drives the plugin for TensorRT 10.3 and newer through a real plugin registry, as an application would.
//
//   registry_driver RUNTIME PLUGIN          what needs no GPU
//   registry_driver RUNTIME PLUGIN CASES    and every recorded case on the current GPU (registry_cases.cpp)
//
// RUNTIME: libnvinfer, libnvinfer_lean or libnvinfer_dispatch of the plugin's major version. Says what it
// checked, a line each; the exit status is 0 if all was right.
#include <cstring>
#include <memory>

#include "registry_cases.h"
#include "registry_host.h"

namespace {

using nvinfer1::DataType;
using nvinfer1::IPluginV3;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;
using nvinfer1::TensorRTPhase;
using test::expect;

// A node's fields; each may be spoilt.
struct Node {
    int32_t num_heads = 4, num_kv_heads = 2, head_dim = 64, rotary_dim = 16;
    float epsilon = 1e-5f;
    std::vector<PluginField> fields{{"num_heads", &num_heads, PluginFieldType::kINT32, 1},
        {"num_kv_heads", &num_kv_heads, PluginFieldType::kINT32, 1},
        {"head_dim", &head_dim, PluginFieldType::kINT32, 1},
        {"rotary_dim", &rotary_dim, PluginFieldType::kINT32, 1},
        {"epsilon", &epsilon, PluginFieldType::kFLOAT32, 1}};

    Node() = default;
    Node(const Node&) = delete;
    Node& operator=(const Node&) = delete;

    IPluginV3* create(nvinfer1::IPluginCreatorV3One& creator, TensorRTPhase phase = TensorRTPhase::kBUILD) {
        const PluginFieldCollection collection{static_cast<int32_t>(fields.size()), fields.data()};
        return creator.createPlugin("layer0", &collection, phase);
    }
};

// Every way to load and unload, and mixtures: each time there is exactly one creator, or none.
void registration(test::Runtime& runtime, const char* plugin) {
    nvinfer1::IPluginRegistry& registry = runtime.registry();
    expect(test::find_creator(runtime) == nullptr, "no creator before the library is there");

    void* opened = dlopen(plugin, RTLD_NOW | RTLD_LOCAL);
    expect(opened != nullptr, std::string("open the plugin") + (opened ? "" : std::string(": ") + dlerror()));
    expect(test::find_creator(runtime) != nullptr, "an opened library registers itself");
    void* handle = registry.loadLibrary(plugin);
    expect(handle != nullptr, "loadLibrary takes over an opened library");
    expect(test::find_creator(runtime) != nullptr, "the creator is there after loadLibrary");
    registry.deregisterLibrary(handle);
    expect(test::find_creator(runtime) == nullptr, "no creator after deregisterLibrary");
    expect(dlclose(opened) == 0, "close the library");

    opened = dlopen(plugin, RTLD_NOW | RTLD_LOCAL);
    expect(opened != nullptr && test::find_creator(runtime) != nullptr,
        "opened again, it registers itself again");
    expect(dlclose(opened) == 0 && test::find_creator(runtime) == nullptr,
        "a closed library leaves no creator behind");

    handle = registry.loadLibrary(plugin);
    expect(handle != nullptr && test::find_creator(runtime) != nullptr, "loadLibrary alone");
    opened = dlopen(plugin, RTLD_NOW | RTLD_LOCAL);
    expect(opened != nullptr && test::find_creator(runtime) != nullptr, "opened after loadLibrary");
    runtime.give_logger(opened);
    int32_t count = 0, ours = 0;
    nvinfer1::IPluginCreatorInterface* const* all = registry.getAllCreators(&count);
    for (int32_t i = 0; i < count; ++i) {
        if (std::strcmp(all[i]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") != 0) continue;
        auto* one = static_cast<nvinfer1::IPluginCreatorV3One*>(all[i]);
        ours += std::strcmp(one->getPluginName(), "DijiangAttention") == 0;
    }
    expect(ours == 1, "exactly one creator of this name");
}

void fields(nvinfer1::IPluginCreatorV3One& creator) {
    expect(std::strcmp(creator.getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") == 0,
        "the creator is of IPluginV3");
    const PluginFieldCollection* names = creator.getFieldNames();
    for (int32_t i = 0; i < names->nbFields; ++i) {
        const PluginField& field = names->fields[i];
        std::printf("field %s %s %d\n", field.name,
            field.type == PluginFieldType::kINT32     ? "int"
            : field.type == PluginFieldType::kFLOAT32 ? "float"
                                                      : "other",
            field.length);
    }
}

void refusals(nvinfer1::IPluginCreatorV3One& creator, test::Logger& logger) {
    const auto refused = [&](const char* what, const char* message, auto spoil) {
        Node node;
        spoil(node);
        expect(node.create(creator) == nullptr && logger.said(message), std::string("refused: ") + what);
    };
    refused("a missing field", "epsilon is missing", [](Node& n) { n.fields.pop_back(); });
    refused("an unknown field", "unknown field scale",
        [](Node& n) { n.fields.emplace_back("scale", &n.epsilon, PluginFieldType::kFLOAT32, 1); });
    refused("a field twice", "head_dim is given twice", [](Node& n) { n.fields.push_back(n.fields[2]); });
    refused("a field of the wrong type", "num_heads has the wrong type",
        [](Node& n) { n.fields[0].type = PluginFieldType::kFLOAT32; });
    refused("a field without data", "head_dim needs one value", [](Node& n) { n.fields[2].data = nullptr; });
    refused("a field of two values", "head_dim needs one value", [](Node& n) { n.fields[2].length = 2; });
    refused("a field without a name", "has no name", [](Node& n) { n.fields[2].name = nullptr; });
    refused("a plan's field in a node", "unknown field max_batch",
        [](Node& n) { n.fields.emplace_back("max_batch", &n.head_dim, PluginFieldType::kINT32, 1); });
    refused("head_dim 72", "head_dim", [](Node& n) { n.head_dim = 72; });
    refused("3 kv heads of 4", "num_kv_heads", [](Node& n) { n.num_kv_heads = 3; });
    refused("an odd rotary_dim", "rotary_dim", [](Node& n) { n.rotary_dim = 15; });
    refused("epsilon 0", "epsilon", [](Node& n) { n.epsilon = 0.0f; });
    expect(creator.createPlugin("x", nullptr, TensorRTPhase::kBUILD) == nullptr && logger.said("no fields"),
        "refused: no fields at all");
    Node lookup;
    lookup.fields.emplace_back("plugin_namespace", "dijiang", PluginFieldType::kCHAR, 7);
    lookup.fields.emplace_back("plugin_version", "1", PluginFieldType::kCHAR, 1);
    const std::unique_ptr<IPluginV3> made(lookup.create(creator));
    expect(made != nullptr, "the node's look-up strings may be among the fields");
}

void formats(IPluginV3* plugin) {
    auto* build = test::build_of(plugin);
    constexpr DataType kTypes[] = {DataType::kFLOAT, DataType::kHALF, DataType::kBF16, DataType::kINT8,
        DataType::kINT32, DataType::kINT64, DataType::kBOOL};
    const auto is_t = [](DataType type) {
        return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
    };
    bool right = true;
    for (const int32_t inputs : {10, 12}) {
        for (const DataType t : kTypes) {
            std::vector<nvinfer1::DynamicPluginTensorDesc> tensors(inputs + 2);
            tensors[0].desc.type = t;
            for (int32_t at = 0; at < inputs + 2; ++at) {
                for (const DataType type : kTypes) {
                    if (at == 0 && type != t) continue;
                    const DataType wanted = at <= 1 || at == inputs ? t
                                            : at == 3 || at == 4    ? DataType::kINT32
                                                                    : DataType::kFLOAT;
                    tensors[at].desc.type = type;
                    tensors[at].desc.format = nvinfer1::TensorFormat::kLINEAR;
                    const bool supported = build->supportsFormatCombination(at, tensors.data(), inputs, 2);
                    right = right && supported == (is_t(t) && type == wanted);
                    tensors[at].desc.format = nvinfer1::TensorFormat::kCHW32;
                    right = right && !build->supportsFormatCombination(at, tensors.data(), inputs, 2);
                }
                tensors[at].desc.type = at <= 1 ? t : DataType::kFLOAT;
            }
        }
    }
    expect(right, "supportsFormatCombination accepts the contract's types, linear, and nothing else");
    std::vector<nvinfer1::DynamicPluginTensorDesc> eleven(13);
    expect(!build->supportsFormatCombination(0, eleven.data(), 11, 2), "11 inputs are refused");
}

// TensorRT's own builder is not at hand, and the plugin needs none: it hands the inputs' expressions on.
class NoExpressions final : public nvinfer1::IExprBuilder {};

void shapes(IPluginV3* plugin, test::Logger& logger) {
    auto* build = test::build_of(plugin);
    NoExpressions builder;
    std::vector<char> expressions(64);  // only their addresses matter
    const auto expression = [&](int32_t i) {
        return reinterpret_cast<const nvinfer1::IDimensionExpr*>(&expressions[i]);
    };
    std::vector<nvinfer1::DimsExprs> inputs(10);
    inputs[0].nbDims = inputs[1].nbDims = 3;
    inputs[2].nbDims = 4;
    for (int32_t i = 0; i < 3; ++i) inputs[1].d[i] = expression(i);
    for (int32_t i = 0; i < 4; ++i) inputs[2].d[i] = expression(8 + i);
    nvinfer1::DimsExprs outputs[2]{};
    expect(
        build->getOutputShapes(inputs.data(), 10, nullptr, 0, outputs, 2, builder) == 0, "getOutputShapes");
    bool same = outputs[0].nbDims == 3 && outputs[1].nbDims == 4;
    for (int32_t i = 0; i < 3; ++i) same = same && outputs[0].d[i] == expression(i);
    for (int32_t i = 0; i < 4; ++i) same = same && outputs[1].d[i] == expression(8 + i);
    expect(same, "output has gate's shape, present_state past_state's");
    inputs[1].nbDims = 2;
    expect(build->getOutputShapes(inputs.data(), 10, nullptr, 0, outputs, 2, builder) != 0 &&
               logger.said("gate has 2"),
        "a gate of two dimensions is refused");

    std::vector<DataType> types(12, DataType::kFLOAT);
    types[0] = types[1] = DataType::kHALF;
    DataType made[2]{};
    expect(build->getOutputDataTypes(made, 2, types.data(), 12) == 0 && made[0] == DataType::kHALF &&
               made[1] == DataType::kFLOAT,
        "output types are T and float32");
    types[0] = DataType::kINT8;
    expect(build->getOutputDataTypes(made, 2, types.data(), 12) != 0 && logger.said("is int8"),
        "T = int8 is refused");
    expect(build->getNbOutputs() == 2, "two outputs");
}

nvinfer1::Dims dims(std::initializer_list<int64_t> sizes) {
    nvinfer1::Dims made{};
    for (const int64_t size : sizes) made.d[made.nbDims++] = size;
    return made;
}

// configurePlugin for Node's geometry with profiles up to [max_batch, max_length]; batch and length are
// dynamic.
int32_t configure(IPluginV3* plugin, int64_t max_batch, int64_t max_length, int64_t gate_width = 256) {
    std::vector<nvinfer1::DynamicPluginTensorDesc> in(10), out(2);
    const auto set = [](nvinfer1::DynamicPluginTensorDesc& at, nvinfer1::Dims shape, DataType type) {
        at.desc.dims = shape;
        at.desc.type = type;
        at.min = at.opt = at.max = shape;
    };
    set(in[0], dims({-1, -1, 512}), DataType::kHALF);
    in[0].max = dims({max_batch, max_length, 512});
    set(in[1], dims({-1, -1, gate_width}), DataType::kHALF);
    set(in[2], dims({-1, 4, 64, 64}), DataType::kFLOAT);
    set(in[3], dims({-1}), DataType::kINT32);
    set(in[4], dims({-1}), DataType::kINT32);
    set(in[5], dims({64, 64}), DataType::kFLOAT);
    set(in[6], dims({256}), DataType::kFLOAT);
    set(in[7], dims({256}), DataType::kFLOAT);
    set(in[8], dims({8}), DataType::kFLOAT);
    set(in[9], dims({4}), DataType::kFLOAT);
    set(out[0], dims({-1, -1, 256}), DataType::kHALF);
    set(out[1], dims({-1, 4, 64, 64}), DataType::kFLOAT);
    return test::build_of(plugin)->configurePlugin(in.data(), 10, out.data(), 2);
}

// The value of an int32 field, or -1.
int32_t value(const PluginFieldCollection* fields, const char* name) {
    for (int32_t i = 0; i < fields->nbFields; ++i) {
        if (std::strcmp(fields->fields[i].name, name) == 0)
            return *static_cast<const int32_t*>(fields->fields[i].data);
    }
    return -1;
}

void lifecycle(nvinfer1::IPluginCreatorV3One& creator, test::Logger& logger) {
    Node node;
    std::unique_ptr<IPluginV3> plugin(node.create(creator));
    expect(plugin != nullptr, "create in the build phase");
    auto* core =
        test::capability<nvinfer1::IPluginV3OneCore>(plugin.get(), nvinfer1::PluginCapabilityType::kCORE);
    expect(core != nullptr && std::strcmp(core->getPluginName(), creator.getPluginName()) == 0 &&
               std::strcmp(core->getPluginVersion(), creator.getPluginVersion()) == 0 &&
               std::strcmp(core->getPluginNamespace(), creator.getPluginNamespace()) == 0,
        "name, version and namespace are the creator's");
    formats(plugin.get());
    shapes(plugin.get(), logger);

    // Without a profile yet nothing is known of sizes, so this attaches where there is no GPU too.
    test::Context context;
    const std::unique_ptr<IPluginV3> attached(test::runtime_of(plugin.get())->attachToContext(&context));
    expect(attached != nullptr && attached != plugin, "attachToContext gives a clone");

    expect(configure(plugin.get(), 4, 512) == 0 && configure(plugin.get(), 16, 1) == 0,
        "configure two profiles");
    expect(configure(plugin.get(), 4, 512, 255) != 0 && logger.said("input 1 (gate)"),
        "a gate too narrow is refused");
    std::unique_ptr<IPluginV3> clone(plugin->clone());
    expect(clone != nullptr && clone != plugin, "clone");
    const std::string identity = test::build_of(plugin.get())->getTimingCacheID();
    plugin.reset();  // a clone must not lean on what it was cloned from
    const PluginFieldCollection* kept = test::runtime_of(clone.get())->getFieldsToSerialize();
    expect(value(kept, "num_heads") == 4 && value(kept, "rotary_dim") == 16, "serialized fields");
    expect(value(kept, "max_batch") == 16 && value(kept, "max_length") == 512,
        "the largest profile is serialized");

    // TensorRT writes the fields to the plan: take the bytes, destroy their owner, rebuild.
    std::vector<std::vector<char>> bytes;
    std::vector<PluginField> copies;
    for (int32_t i = 0; i < kept->nbFields; ++i) {
        const auto* data = static_cast<const char*>(kept->fields[i].data);
        bytes.emplace_back(data, data + 4 * kept->fields[i].length);
        copies.push_back(kept->fields[i]);
        copies.back().data = bytes.back().data();
    }
    clone.reset();
    const PluginFieldCollection plan{static_cast<int32_t>(copies.size()), copies.data()};
    const std::unique_ptr<IPluginV3> rebuilt(creator.createPlugin("layer0", &plan, TensorRTPhase::kRUNTIME));
    expect(rebuilt != nullptr, "rebuild in the runtime phase");
    expect(identity == test::build_of(rebuilt.get())->getTimingCacheID(), "rebuilt with the same attributes");
    kept = test::runtime_of(rebuilt.get())->getFieldsToSerialize();
    expect(value(kept, "max_batch") == 16 && value(kept, "max_length") == 512, "and the same limits");
    Node other;
    other.epsilon = 1.0000001e-5f;
    const std::unique_ptr<IPluginV3> different(other.create(creator));
    expect(identity != test::build_of(different.get())->getTimingCacheID(),
        "another epsilon is another identity");
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 3 && count != 4) {
        std::fprintf(stderr, "usage: %s RUNTIME PLUGIN [CASES]\n", arguments[0]);
        return 2;
    }
    static test::Runtime runtime(arguments[1]);
    registration(runtime, arguments[2]);
    nvinfer1::IPluginCreatorV3One* creator = test::find_creator(runtime);
    fields(*creator);
    refusals(*creator, runtime.logger);
    lifecycle(*creator, runtime.logger);
    run_linear(runtime);
    run_step(runtime);
    if (count == 4) run_cases(*creator, arguments[3], runtime.logger);
    std::printf("all right\n");
    return 0;
}
