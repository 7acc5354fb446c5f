// DijiangStep in a real plugin registry: fields, refusals, types, shapes, clones, and what a plan keeps.
#include <cstring>
#include <memory>

#include "dijiang/step.h"
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

constexpr char kName[] = "DijiangStep";
constexpr int32_t kLayers = 2, kHidden = 64, kVocabulary = 101, kHeads = 4, kDim = 16, kRows = 8, kPositions = 42;

// A small GPT-NeoX, or with `learned` positions, or of quantised weights with an embedding in int8 or int4 (`embedding`, a
// dijiang_weight_format); each field may be spoilt.
struct Node {
    int32_t formats[2 + kLayers] = {2, 0, 0b10100, 0};
    int32_t values[17] = {kLayers, kHidden, 128, kVocabulary, kHeads, kHeads, kDim, 4, 1, 1, 2, 1, 0, 0, 0, kRows, 4};
    float epsilons[2] = {1e-5f, 1e-5f};
    std::vector<PluginField> fields;

    explicit Node(bool learned = false, int32_t embedding = 0) {
        static const char* const names[] = {"layers", "hidden", "inner", "vocabulary", "num_heads", "num_kv_heads",
            "head_dim", "rotary_dim", "dtype", "norm", "activation", "parallel_residual", "table_rows", "position_rows",
            "position_offset", "rows", "blocks"};
        if (learned) at("position_rows", names) = kPositions;
        for (int32_t i = 0; i < 17; ++i) fields.emplace_back(names[i], &values[i], PluginFieldType::kINT32, 1);
        formats[1] = embedding;
        if (embedding != 0) fields.emplace_back("weight_formats", formats, PluginFieldType::kINT32, 2 + kLayers);
        fields.emplace_back("norm_epsilon", &epsilons[0], PluginFieldType::kFLOAT32, 1);
        fields.emplace_back("group_norm_epsilon", &epsilons[1], PluginFieldType::kFLOAT32, 1);
    }
    Node(const Node&) = delete;
    Node& operator=(const Node&) = delete;

    int32_t& operator[](const char* name) {
        for (int32_t i = 0; i < 17; ++i)
            if (std::strcmp(fields[i].name, name) == 0) return values[i];
        expect(false, std::string("a field ") + name);
        return values[0];
    }
    IPluginV3* create(nvinfer1::IPluginCreatorV3One& creator, TensorRTPhase phase = TensorRTPhase::kBUILD) {
        const PluginFieldCollection collection{static_cast<int32_t>(fields.size()), fields.data()};
        return creator.createPlugin("step0", &collection, phase);
    }

private:
    int32_t& at(const char* name, const char* const* names) {
        int32_t i = 0;
        while (std::strcmp(names[i], name) != 0) ++i;
        return values[i];
    }
};

nvinfer1::PluginTensorDesc tensor(DataType type, std::initializer_list<int64_t> sizes) {
    nvinfer1::PluginTensorDesc made{};
    made.type = type;
    made.format = nvinfer1::TensorFormat::kLINEAR;
    for (const int64_t size : sizes) made.dims.d[made.dims.nbDims++] = size;
    return made;
}

// Of a call: input_ids, positions, seq_lens, states, packed, embedding, perhaps its scales and positions' table; logits,
// states.
std::vector<nvinfer1::PluginTensorDesc> tensors(
    int64_t batch, int64_t lines, DataType ids, bool learned = false, int32_t embedding = 0) {
    constexpr DataType kF = DataType::kFLOAT, kI = DataType::kINT32;
    std::vector<nvinfer1::PluginTensorDesc> all = {tensor(ids, {batch, 1}), tensor(ids, {batch}), tensor(ids, {batch})};
    for (int32_t i = 0; i < kLayers; ++i) all.push_back(tensor(kF, {batch, kHeads, kDim, kDim}));
    all.push_back(tensor(kI, {lines, 32}));
    all.push_back(tensor(kI, {kVocabulary, kHidden / (embedding == 2 ? 8 : embedding == 1 ? 4 : 2)}));
    // float16 [V, h/32] in lines of 128 bytes: 404 bytes
    if (embedding != 0) all.push_back(tensor(kI, {4, 32}));
    if (learned) all.push_back(tensor(kI, {kPositions, kHidden / 2}));
    all.push_back(tensor(kF, {batch, 1, kVocabulary}));
    for (int32_t i = 0; i < kLayers; ++i) all.push_back(tensor(kF, {batch, kHeads, kDim, kDim}));
    return all;
}

constexpr int32_t kOutputs = 1 + kLayers;

int32_t configure(IPluginV3* plugin, const std::vector<nvinfer1::PluginTensorDesc>& given, int64_t most = 0) {
    std::vector<nvinfer1::DynamicPluginTensorDesc> all(given.size());
    for (size_t i = 0; i < given.size(); ++i) {
        all[i].desc = given[i];
        all[i].min = all[i].opt = all[i].max = given[i].dims;
        if (most > 0 && given[i].dims.d[0] == -1) all[i].max.d[0] = most;
    }
    const int32_t inputs = static_cast<int32_t>(given.size()) - kOutputs;
    return test::build_of(plugin)->configurePlugin(all.data(), inputs, all.data() + inputs, kOutputs);
}

// What the plugin expects of the packed weights, as it says itself: [lines, 32].
int64_t lines_of(IPluginV3* plugin, test::Logger& logger, bool learned, int32_t embedding) {
    for (int64_t lines = 1; lines < 1 << 14; ++lines)
        if (configure(plugin, tensors(1, lines, DataType::kINT32, learned, embedding)) == 0) return logger.forget(), lines;
    expect(false, "step: packed weights of some size fit");
    return 0;
}

void refusals(nvinfer1::IPluginCreatorV3One& creator, test::Logger& logger) {
    const auto refused = [&](const char* what, const char* text, auto spoil) {
        Node node;
        spoil(node);
        const std::unique_ptr<IPluginV3> made(node.create(creator));
        expect(made == nullptr && logger.said(text, kName), std::string("step refused: ") + what);
    };
    refused("a missing field", "group_norm_epsilon is missing", [](Node& n) { n.fields.pop_back(); });
    refused("an unknown field", "unknown field alpha",
        [](Node& n) { n.fields.emplace_back("alpha", n.epsilons, PluginFieldType::kFLOAT32, 1); });
    refused("a field of the wrong type", "hidden has the wrong type",
        [](Node& n) { n.fields[1].type = PluginFieldType::kFLOAT32; });
    refused("a field of two values", "needs one value", [](Node& n) { n.fields[0].length = 2; });
    for (const char* name : {"layers", "hidden", "inner", "vocabulary", "num_heads", "num_kv_heads", "head_dim", "rotary_dim",
             "dtype", "norm", "activation", "parallel_residual", "table_rows", "position_rows", "position_offset", "rows",
             "blocks"})
        for (const int32_t value : {-1, INT32_MIN, INT32_MAX})
            if (value != INT32_MAX || (std::strcmp(name, "position_rows") != 0 && std::strcmp(name, "blocks") != 0))
                refused((std::string(name) + " " + std::to_string(value)).c_str(), "", [&](Node& n) { n[name] = value; });
    refused("9 rows", "rows is out of range", [](Node& n) { n["rows"] = 9; });
    refused("no rows", "rows is out of range", [](Node& n) { n["rows"] = 0; });
    refused("no blocks", "blocks is out of range", [](Node& n) { n["blocks"] = 0; });
    refused("float32", "dtype", [](Node& n) { n["dtype"] = 0; });
    refused("activations that do not fit", "does not fit a block's shared memory", [](Node& n) { n["inner"] = 1 << 18; });
    refused("an epsilon of 0", "norm_epsilon", [](Node& n) { n.epsilons[0] = 0.0f; });
    static const int32_t formats[2 + kLayers] = {2, 1, 256, 0}, other[2 + kLayers] = {2, 3, 0, 0};
    const auto weights = [&](const int32_t* values, int32_t count) {
        return [=](Node& n) { n.fields.emplace_back("weight_formats", values, PluginFieldType::kINT32, count); };
    };
    refused("a single format that is not 0", "got 1 values", weights(formats, 1));
    refused("formats of fewer layers", "got 3 values for 2 layers", weights(formats, 1 + kLayers));
    refused("formats of more layers than there may be", "needs 1 to 130 values", weights(formats, 131));
    refused("a layer with more matrices", "got 256 for layer 0", weights(formats, 2 + kLayers));
    refused("a format that there is not", "embedding_format", weights(other, 2 + kLayers));
    refused("no formats of layers that there are not", "layers", [&](Node& n) {
        weights(formats, 2 + kLayers)(n);
        n["layers"] = INT32_MAX;
    });
}

void formats(IPluginV3* plugin) {
    auto* build = test::build_of(plugin);
    bool right = build->getNbOutputs() == kOutputs;
    for (const DataType ids : {DataType::kINT32, DataType::kINT64}) {
        const auto wanted = tensors(1, 8, ids);
        const int32_t all = static_cast<int32_t>(wanted.size());
        std::vector<nvinfer1::DynamicPluginTensorDesc> given(wanted.size());
        for (int32_t at = 0; at < all; ++at) {
            for (const DataType type : {DataType::kFLOAT, DataType::kHALF, DataType::kINT32, DataType::kINT64}) {
                given[at].desc.type = type;
                given[at].desc.format = nvinfer1::TensorFormat::kLINEAR;
                const bool integer = type == DataType::kINT32 || type == DataType::kINT64;
                right = right && build->supportsFormatCombination(at, given.data(), all - kOutputs, kOutputs) ==
                                     (at == 0 ? integer : type == wanted[at].type);
                given[at].desc.format = nvinfer1::TensorFormat::kCHW32;
                right = right && !build->supportsFormatCombination(at, given.data(), all - kOutputs, kOutputs);
            }
            given[at].desc = wanted[at];
        }
        right = right && !build->supportsFormatCombination(0, given.data(), all - kOutputs - 1, kOutputs);
    }
    expect(right, "step: each tensor has its one type, linear; integers are int32 or int64, all alike");
    DataType types[kOutputs]{};
    expect(build->getOutputDataTypes(types, kOutputs, nullptr, 0) == 0 && types[0] == DataType::kFLOAT &&
               types[kLayers] == DataType::kFLOAT,
        "step: outputs are float32");
}

void shapes(IPluginV3* plugin, test::Logger& logger, bool learned, int32_t embedding) {
    const int64_t lines = lines_of(plugin, logger, learned, embedding);
    for (const DataType ids : {DataType::kINT32, DataType::kINT64}) {
        expect(configure(plugin, tensors(kRows, lines, ids, learned, embedding)) == 0, "step: sizes that fit");
        expect(configure(plugin, tensors(-1, lines, ids, learned, embedding), kRows) == 0, "step: an unknown batch");
    }
    expect(configure(plugin, tensors(-1, lines, DataType::kINT32, learned, embedding), kRows + 1) != 0 &&
               logger.said("the profile allows 9 rows", kName),
        "step refused: a profile of more rows than the plan is for");
    expect(configure(plugin, tensors(kRows + 1, lines, DataType::kINT32, learned, embedding)) != 0 &&
               logger.said("got 9 rows", kName),
        "step refused: more rows");
    const auto right = tensors(1, lines, DataType::kINT32, learned, embedding);
    for (size_t at = 0; at < right.size(); ++at) {
        for (int32_t dim = 0; dim < right[at].dims.nbDims; ++dim) {
            auto wrong = right;
            ++wrong[at].dims.d[dim];
            expect(configure(plugin, wrong) != 0 && logger.said("put ", kName),
                "step refused: tensor " + std::to_string(at) + " with another size " + std::to_string(dim));
        }
        auto wrong = right;
        wrong[at].type = DataType::kHALF;
        expect(configure(plugin, wrong) != 0 && logger.said("is float16", kName),
            "step refused: tensor " + std::to_string(at) + " of another type");
    }
    auto few = right;
    few.erase(few.begin());
    expect(configure(plugin, few) != 0 && logger.said("outputs; expected", kName), "step refused: too few inputs");
}

// What a plan keeps of a plugin, of which it can be made again; the plugin's identity.
std::string kept(nvinfer1::IPluginCreatorV3One& creator, IPluginV3* plugin, int32_t formats, test::Logger& logger) {
    const std::unique_ptr<IPluginV3> copy(plugin->clone());
    const std::string identity = test::build_of(plugin)->getTimingCacheID();
    expect(copy != nullptr && identity == test::build_of(copy.get())->getTimingCacheID(), "step: a clone is the same");
    const PluginFieldCollection* fields = test::runtime_of(copy.get())->getFieldsToSerialize();
    expect(fields->nbFields == 21 && std::strcmp(fields->fields[19].name, "weight_formats") == 0 &&
               fields->fields[19].length == formats && std::strcmp(fields->fields[20].name, "packing") == 0,
        "step: a plan keeps every field");
    const std::unique_ptr<IPluginV3> rebuilt(creator.createPlugin("step0", fields, TensorRTPhase::kRUNTIME));
    expect(rebuilt != nullptr && identity == test::build_of(rebuilt.get())->getTimingCacheID(),
        "step: rebuilt of what a plan keeps");
    // Quantised weights of another order, such as those of plans that keep no number for it.
    const bool quantised = formats != 1;
    std::vector<nvinfer1::PluginField> older(fields->fields, fields->fields + 20);
    PluginFieldCollection given{20, older.data()};
    const std::unique_ptr<IPluginV3> unnumbered(creator.createPlugin("step0", &given, TensorRTPhase::kRUNTIME));
    expect((unnumbered == nullptr) == quantised && (!quantised || logger.said("packed in the order of another version", kName)),
        "step refused: a plan of another packing, if its weights are quantised");
    const int32_t other = DIJIANG_STEP_PACKING + 1;
    older.emplace_back("packing", &other, PluginFieldType::kINT32, 1);
    given = {21, older.data()};
    const std::unique_ptr<IPluginV3> later(creator.createPlugin("step0", &given, TensorRTPhase::kRUNTIME));
    expect((later == nullptr) == quantised && (!quantised || logger.said("got packing", kName)), "step: and of a later one");
    return identity;
}

void lifecycle(nvinfer1::IPluginCreatorV3One& creator, IPluginV3* plugin, test::Logger& logger) {
    const std::string identity = kept(creator, plugin, 1, logger);
    for (const char* name : {"rows", "blocks", "inner", "parallel_residual"}) {
        Node other;
        other[name] = std::strcmp(name, "inner") == 0 ? 160 : std::strcmp(name, "parallel_residual") == 0 ? 0 : 7;
        const std::unique_ptr<IPluginV3> different(other.create(creator));
        expect(different != nullptr && identity != test::build_of(different.get())->getTimingCacheID(),
            std::string("step: another identity with other ") + name);
    }
    // 4 blocks are what no GPU has that this runs on; and where there is no GPU it cannot be asked.
    test::Context context;
    const std::unique_ptr<IPluginV3> attached(test::runtime_of(plugin)->attachToContext(&context));
    expect(attached == nullptr && context.recorder.getNbErrors() == 1,
        "step: no context on a GPU that the weights are not packed for");
    logger.forget();
    const auto call = tensors(1, 1, DataType::kINT32);
    const void* inputs[kLayers + 5] = {};
    void* outputs[kOutputs] = {};
    expect(test::runtime_of(plugin)->enqueue(
               call.data(), call.data() + kLayers + 5, inputs, outputs, nullptr, nullptr) != 0 &&
               logger.said("input 5 (packed)", kName),
        "step: a call of other sizes is refused");
}

}  // namespace

void run_step(test::Runtime& runtime) {
    auto* creator =
        static_cast<nvinfer1::IPluginCreatorV3One*>(runtime.registry().getCreator(kName, "1", "dijiang"));
    expect(creator != nullptr, "step: the creator is there");
    if (creator == nullptr) return;
    refusals(*creator, runtime.logger);
    for (const bool learned : {false, true})
        for (const int32_t embedding : {0, 1, 2}) {
            Node node(learned, embedding);
            const std::unique_ptr<IPluginV3> plugin(node.create(*creator));
            expect(plugin != nullptr, std::string("step: created") + (learned ? ", with learned positions" : "") +
                                          (embedding != 0 ? ", quantised" : ""));
            if (plugin == nullptr) return;
            shapes(plugin.get(), runtime.logger, learned, embedding);
            if (embedding != 0) {
                const std::string identity = kept(*creator, plugin.get(), 2 + kLayers, runtime.logger);
                Node other(learned, embedding);
                other.formats[3] = 1;
                const std::unique_ptr<IPluginV3> different(other.create(*creator));
                expect(different != nullptr && identity != test::build_of(different.get())->getTimingCacheID(),
                    "step: another identity with other formats");
            } else if (!learned) {
                formats(plugin.get());
                lifecycle(*creator, plugin.get(), runtime.logger);
            }
    }
}
