// Drives DijiangStep for TensorRT 8.6 without TensorRT, whose registry is in the full library alone: what its builder
// and its runtime call, as far as that needs no GPU.
//
//   step_v2_driver libdijiang_tensorrt_8.so
//
// Says what it checked, a line each; the exit status is 0 if all was right.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace {

using nvinfer1::DataType;
using nvinfer1::IPluginV2DynamicExt;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;

void expect(bool right, const std::string& what) {
    std::printf("%s %s\n", right ? "ok  " : "FAIL", what.c_str());
    std::fflush(stdout);
    if (!right) std::exit(1);
}

constexpr int32_t kLayers = 2, kInputs = 3 + kLayers + 2, kOutputs = 1 + kLayers, kVocabulary = 101;

// A small GPT-NeoX for up to 8 rows, packed for 4 blocks, as the builder is given it.
struct Node {
    std::vector<std::pair<const char*, int32_t>> integers = {{"layers", kLayers}, {"hidden", 64}, {"inner", 128},
        {"vocabulary", kVocabulary}, {"num_heads", 4}, {"num_kv_heads", 4}, {"head_dim", 16}, {"rotary_dim", 4},
        {"dtype", 1}, {"norm", 1}, {"activation", 2}, {"parallel_residual", 1}, {"table_rows", 0}, {"position_rows", 0},
        {"position_offset", 0}, {"rows", 8}, {"blocks", 4}};
    float epsilon = 1e-5f;
    std::vector<int32_t> formats;  // none, or of quantised weights

    IPluginV2DynamicExt* create(nvinfer1::IPluginCreator& creator) {
        std::vector<PluginField> fields;
        for (const auto& it : integers) fields.emplace_back(it.first, &it.second, PluginFieldType::kINT32, 1);
        for (const char* name : {"norm_epsilon", "group_norm_epsilon"})
            fields.emplace_back(name, &epsilon, PluginFieldType::kFLOAT32, 1);
        if (!formats.empty())
            fields.emplace_back("weight_formats", formats.data(), PluginFieldType::kINT32, static_cast<int32_t>(formats.size()));
        const nvinfer1::PluginFieldCollection all{static_cast<int32_t>(fields.size()), fields.data()};
        return static_cast<IPluginV2DynamicExt*>(creator.createPlugin("step", &all));
    }
};

std::vector<char> bytes_of(const IPluginV2DynamicExt& plugin) {
    std::vector<char> bytes(plugin.getSerializationSize());
    plugin.serialize(bytes.data());
    return bytes;
}

// Expressions that only are told apart, and the latest constant.
class Expressions final : public nvinfer1::IExprBuilder, nvinfer1::apiv::VExprBuilder {
public:
    Expressions() { mImpl = this; }
    const nvinfer1::IDimensionExpr* constant(int32_t value) noexcept override {
        latest = value;
        return of(63);
    }
    const nvinfer1::IDimensionExpr* operation(nvinfer1::DimensionOperation, const nvinfer1::IDimensionExpr&,
        const nvinfer1::IDimensionExpr&) noexcept override {
        return nullptr;
    }
    const nvinfer1::IDimensionExpr* of(int32_t i) const {
        return reinterpret_cast<const nvinfer1::IDimensionExpr*>(&places_[i]);
    }
    int32_t latest = 0;

private:
    char places_[64] = {};
};

void shapes(IPluginV2DynamicExt& plugin) {
    Expressions builder;
    std::vector<nvinfer1::DimsExprs> in(kInputs);
    for (int32_t at = 0; at < kInputs; ++at) {
        in[at].nbDims = at == 0 ? 2 : at < 3 ? 1 : at < 3 + kLayers ? 4 : 2;
        for (int32_t i = 0; i < in[at].nbDims; ++i) in[at].d[i] = builder.of(4 * at + i);
    }
    const nvinfer1::DimsExprs logits = plugin.getOutputDimensions(0, in.data(), kInputs, builder);
    expect(logits.nbDims == 3 && logits.d[0] == builder.of(0) && logits.d[1] == builder.of(1) &&
               logits.d[2] == builder.of(63) && builder.latest == kVocabulary,
        "logits are [batch, 1, vocabulary]");
    for (int32_t layer = 0; layer < kLayers; ++layer) {
        const nvinfer1::DimsExprs state = plugin.getOutputDimensions(1 + layer, in.data(), kInputs, builder);
        expect(state.nbDims == 4 && state.d[0] == in[3 + layer].d[0] && state.d[3] == in[3 + layer].d[3],
            "a present state has its past state's shape");
        expect(plugin.getOutputDataType(1 + layer, nullptr, kInputs) == DataType::kFLOAT, "and is float32");
    }
    expect(plugin.getOutputDimensions(kOutputs, in.data(), kInputs, builder).nbDims == -1, "no output more");
    expect(plugin.getOutputDimensions(0, in.data(), kInputs - 1, builder).nbDims == -1, "nor of fewer inputs");
}

void types(IPluginV2DynamicExt& plugin) {
    bool right = plugin.getNbOutputs() == kOutputs;
    std::vector<PluginTensorDesc> given(kInputs + kOutputs);
    for (int32_t at = 0; at < kInputs + kOutputs; ++at) {
        const bool integer = at < 3 || (at >= 3 + kLayers && at < kInputs);
        for (const DataType type : {DataType::kFLOAT, DataType::kHALF, DataType::kINT8, DataType::kINT32}) {
            given[at].type = type;
            given[at].format = nvinfer1::TensorFormat::kLINEAR;
            right = right && plugin.supportsFormatCombination(at, given.data(), kInputs, kOutputs) ==
                                 (type == (integer ? DataType::kINT32 : DataType::kFLOAT));
            given[at].format = nvinfer1::TensorFormat::kCHW32;
            right = right && !plugin.supportsFormatCombination(at, given.data(), kInputs, kOutputs);
        }
        given[at].type = integer ? DataType::kINT32 : DataType::kFLOAT;
    }
    expect(right, "each tensor has its one type, linear, and nothing else");
}

// Whatever stands in a plan: no blob, or one whose plugin writes the same again.
void hostile(nvinfer1::IPluginCreator& creator, const std::vector<char>& good) {
    int32_t taken = 0, refused = 0;
    for (size_t at = 0; at < good.size(); ++at)
        for (const int value : {0, 1, 2, 0x7f, 0x80, 0xff}) {
            std::vector<char> blob = good;
            blob[at] = static_cast<char>(value);
            auto* plugin = static_cast<IPluginV2DynamicExt*>(creator.deserializePlugin("", blob.data(), blob.size()));
            ++(plugin == nullptr ? refused : taken);
            if (plugin == nullptr) continue;
            if (bytes_of(*plugin) != blob) expect(false, "a changed blob that is taken means what it says");
            plugin->destroy();
        }
    expect(refused > 100 && taken > 10, "changed blobs: " + std::to_string(refused) + " refused, " +
                                            std::to_string(taken) + " taken, none misread");
    for (const size_t size : {size_t{0}, good.size() - 1, good.size() + 1}) {
        std::vector<char> blob = good;
        blob.resize(size);
        expect(creator.deserializePlugin("", blob.data(), size) == nullptr, "refused: " + std::to_string(size) + " bytes");
    }
}

// What a plan keeps, and reads.
void plan(nvinfer1::IPluginCreator& creator, IPluginV2DynamicExt& plugin, size_t size) {
    const std::vector<char> bytes = bytes_of(plugin);
    expect(bytes.size() == size && std::memcmp(bytes.data(), "DJTS", 4) == 0,
        "a plan keeps " + std::to_string(size) + " bytes");
    IPluginV2DynamicExt* copy = plugin.clone();
    expect(bytes_of(*copy) == bytes, "a clone is the same");
    copy->destroy();
    auto* read = static_cast<IPluginV2DynamicExt*>(creator.deserializePlugin("", bytes.data(), bytes.size()));
    expect(read != nullptr && bytes_of(*read) == bytes, "read from a plan");
    read->destroy();
    hostile(creator, bytes);
}

void call(IPluginV2DynamicExt& plugin) {
    std::vector<nvinfer1::DynamicPluginTensorDesc> tensors(kInputs + kOutputs);  // no tensor has a shape
    plugin.configurePlugin(tensors.data(), kInputs, tensors.data() + kInputs, kOutputs);
    std::vector<PluginTensorDesc> now(kInputs + kOutputs);
    const void* in[kInputs] = {};
    void* out[kOutputs] = {};
    expect(plugin.enqueue(now.data(), now.data() + kInputs, in, out, nullptr, nullptr) != 0,
        "what does not fit when it is configured does not run");
    IPluginV2DynamicExt* copy = plugin.clone();
    expect(copy->enqueue(now.data(), now.data() + kInputs, in, out, nullptr, nullptr) != 0, "nor does its copy");
    copy->destroy();
    expect(plugin.getWorkspaceSize(now.data(), kInputs, now.data() + kInputs, kOutputs) == 0, "it asks for no workspace");
    // 4 blocks are what no GPU has that this runs on; and where there is no GPU it cannot be asked.
    expect(plugin.initialize() != 0, "no memory on a GPU that the weights are not packed for");
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 2) return std::fprintf(stderr, "usage: %s PLUGIN\n", arguments[0]), 2;
    void* library = dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL);
    expect(library != nullptr, std::string("open the plugin") + (library ? "" : std::string(": ") + dlerror()));
    using Get = nvinfer1::IPluginCreator* const* (*)(int32_t&);
    auto get = reinterpret_cast<Get>(dlsym(library, "getPluginCreators"));
    expect(get != nullptr, "it has getPluginCreators");
    int32_t creators = 0;
    nvinfer1::IPluginCreator* const* all = get(creators);
    nvinfer1::IPluginCreator* creator = nullptr;
    for (int32_t i = 0; i < creators; ++i)
        if (std::strcmp(all[i]->getPluginName(), "DijiangStep") == 0) creator = all[i];
    expect(creators == 3 && creator != nullptr && std::strcmp(creator->getPluginVersion(), "1") == 0 &&
               std::strcmp(creator->getPluginNamespace(), "dijiang") == 0,
        "three creators, one of them DijiangStep's");
    expect(creator->getFieldNames()->nbFields == 20, "its fields");
    Node node;
    IPluginV2DynamicExt* plugin = node.create(*creator);
    expect(plugin != nullptr && std::strcmp(plugin->getPluginType(), "DijiangStep") == 0, "created");
    types(*plugin);
    shapes(*plugin);
    plan(*creator, *plugin, 88);
    node.formats = {1, 1, 0b10100, 0};  // of the head, the embedding, and each layer
    IPluginV2DynamicExt* quantised = node.create(*creator);
    expect(quantised != nullptr, "created, quantised");
    plan(*creator, *quantised, 88 + 4 * (2 + kLayers));
    quantised->destroy();
    call(*plugin);
    plugin->destroy();
    std::printf("all right\n");
    return 0;
}
