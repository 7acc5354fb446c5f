// DijiangLinear in a real plugin registry: fields, refusals, types, shapes, clones, and what a plan keeps.
#include <cstring>
#include <memory>
#include <utility>

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

constexpr char kName[] = "DijiangLinear";

// A product with bias, norm and GELU, and a sum of two with a residual; each field may be spoilt.
struct Node {
    int32_t term_output[3] = {0, 1, 1}, term_bias[3] = {1, 0, 1};
    int32_t activation[2] = {2, 0}, norm[2] = {1, 0}, norm_bias[2] = {1, 0}, residual[2] = {0, 1}, dtype = 1;
    float epsilon[2] = {1e-5f, 0.0f};
    std::vector<PluginField> fields{{"term_output", term_output, PluginFieldType::kINT32, 3},
        {"term_bias", term_bias, PluginFieldType::kINT32, 3},
        {"output_activation", activation, PluginFieldType::kINT32, 2},
        {"output_norm", norm, PluginFieldType::kINT32, 2},
        {"output_norm_bias", norm_bias, PluginFieldType::kINT32, 2},
        {"output_epsilon", epsilon, PluginFieldType::kFLOAT32, 2},
        {"output_residual", residual, PluginFieldType::kINT32, 2},
        {"dtype", &dtype, PluginFieldType::kINT32, 1}};

    Node() = default;
    Node(const Node&) = delete;
    Node& operator=(const Node&) = delete;

    IPluginV3* create(nvinfer1::IPluginCreatorV3One& creator) {
        const PluginFieldCollection collection{static_cast<int32_t>(fields.size()), fields.data()};
        return creator.createPlugin("linear0", &collection, TensorRTPhase::kBUILD);
    }
};

// term 0: input, weight, bias; term 1: input, weight; term 2: input, weight, bias; output 0: norm_weight,
// norm_bias; output 1: residual; then the outputs.
constexpr int32_t kInputs = 11, kOutputs = 2;
constexpr DataType kT = DataType::kHALF, kI = DataType::kINT32, kF = DataType::kFLOAT;
constexpr DataType kTypes[] = {kT, kI, kF, kT, kI, kT, kI, kF, kF, kF, kT, kT, kT};

template <typename Spoil>
void refused(nvinfer1::IPluginCreatorV3One& creator, test::Logger& logger, const char* what, const char* text,
    Spoil spoil) {
    Node node;
    spoil(node);
    const std::unique_ptr<IPluginV3> made(node.create(creator));
    expect(made == nullptr && logger.said(text, kName), std::string("linear refused: ") + what);
}

void formats(IPluginV3* plugin) {
    auto* build = test::build_of(plugin);
    std::vector<nvinfer1::DynamicPluginTensorDesc> tensors(kInputs + kOutputs);
    bool right = build->getNbOutputs() == kOutputs;
    for (int32_t at = 0; at < kInputs + kOutputs; ++at)
        for (const DataType type : {kF, kT, kI, DataType::kBF16, DataType::kINT64}) {
            tensors[at].desc.type = type;
            tensors[at].desc.format = nvinfer1::TensorFormat::kLINEAR;
            right = right && build->supportsFormatCombination(at, tensors.data(), kInputs, kOutputs) ==
                                 (type == kTypes[at]);
            tensors[at].desc.format = nvinfer1::TensorFormat::kCHW32;
            right = right && !build->supportsFormatCombination(at, tensors.data(), kInputs, kOutputs);
        }
    expect(right, "linear: each tensor has its one type, linear, and nothing else");
    tensors[0].desc = {};
    tensors[0].desc.type = kT;
    expect(!build->supportsFormatCombination(0, tensors.data(), kInputs - 1, kOutputs), "linear: too few inputs");
    DataType types[kOutputs]{};
    expect(build->getOutputDataTypes(types, kOutputs, kTypes, kInputs) == 0 && types[0] == kT && types[1] == kT,
        "linear: output types");
}

// Rows 2 x 1, K 64, 32 and 96, N 24 and 40.
std::vector<nvinfer1::PluginTensorDesc> call_of_right_sizes() {
    const std::vector<int64_t> shapes[] = {{2, 1, 64}, {24, 32}, {24}, {2, 1, 32}, {40, 16}, {2, 1, 96}, {40, 48},
        {40}, {64}, {64}, {2, 1, 40}, {2, 1, 24}, {2, 1, 40}};
    std::vector<nvinfer1::PluginTensorDesc> tensors;
    for (int32_t at = 0; at < kInputs + kOutputs; ++at) {
        nvinfer1::PluginTensorDesc tensor{};
        tensor.type = kTypes[at];
        tensor.dims.nbDims = static_cast<int32_t>(shapes[at].size());
        for (size_t i = 0; i < shapes[at].size(); ++i) tensor.dims.d[i] = shapes[at][i];
        tensors.push_back(tensor);
    }
    return tensors;
}

void shapes(IPluginV3* plugin, test::Logger& logger) {
    auto* build = test::build_of(plugin);
    const auto configure = [&](const std::vector<nvinfer1::PluginTensorDesc>& given) {
        std::vector<nvinfer1::DynamicPluginTensorDesc> tensors(given.size());
        for (size_t i = 0; i < given.size(); ++i) {
            tensors[i].desc = given[i];
            tensors[i].min = tensors[i].max = given[i].dims;
        }
        return build->configurePlugin(tensors.data(), kInputs, tensors.data() + kInputs, kOutputs);
    };
    expect(configure(call_of_right_sizes()) == 0, "linear: sizes that fit");
    auto unknown = call_of_right_sizes();
    for (auto& tensor : unknown)
        if (tensor.dims.nbDims == 3) tensor.dims.d[0] = -1;
    expect(configure(unknown) == 0, "linear: an unknown batch");
    const auto reserved = [&](int64_t rows) {
        std::vector<nvinfer1::DynamicPluginTensorDesc> tensors;
        for (auto tensor : call_of_right_sizes()) {
            nvinfer1::DynamicPluginTensorDesc it{};
            it.min = it.max = tensor.dims;
            if (tensor.dims.nbDims == 3) it.max.d[1] = rows, tensor.dims.d[1] = -1;
            it.desc = tensor;
            tensors.push_back(it);
        }
        return build->getWorkspaceSize(tensors.data(), kInputs, tensors.data() + kInputs, kOutputs);
    };
    expect(reserved(1) == 0 && reserved(8) == 0, "linear: few rows need no workspace");
    expect(reserved(512) > 0 && reserved(2048) > reserved(512), "linear: many rows do, as the profile's most have it");
    const struct {
        int32_t at, dimension;
        int64_t size;
        const char* text;
    } wrong[] = {{1, 1, 31, "input 1 (weight of term 0)"}, {2, 0, 25, "input 2 (bias of term 0)"},
        {5, 0, 3, "input 5 (input of term 2)"}, {6, 0, 41, "input 6 (weight of term 2)"},
        {8, 0, 32, "input 8 (norm_weight of output 0)"}, {10, 2, 24, "input 10 (residual of output 1)"},
        {12, 2, 41, "output 1 (output of output 1)"}};
    for (const auto& it : wrong) {
        auto call = call_of_right_sizes();
        call[it.at].dims.d[it.dimension] = it.size;
        expect(configure(call) != 0 && logger.said(it.text, kName), std::string("linear refused: ") + it.text);
    }
    auto odd = call_of_right_sizes();
    odd[3].dims.d[2] = 33;  // its weight has 16 pairs, which is 33 / 2 as well
    expect(configure(odd) != 0 && logger.said("multiple of 32", kName), "linear refused: K 33");
    auto many = call_of_right_sizes();
    for (auto& tensor : many)
        if (tensor.dims.nbDims == 3) tensor.dims.d[0] = tensor.dims.d[1] = 65536;
    expect(configure(many) != 0 && logger.said("fewer than 2^31", kName), "linear refused: 2^32 rows");
    auto call = call_of_right_sizes();
    call[1].type = kF;
    expect(configure(call) != 0 && logger.said("is float32", kName), "linear refused: weights of another type");
}

// Int4 of bundles, as a parser makes it: a layer of it is created and shaped, and told to be packed.
struct Stored {
    int32_t zero = 0, one = 1, format = 4, width = 0;
    float epsilon = 0.0f;
    std::vector<PluginField> fields{{"term_output", &zero, PluginFieldType::kINT32, 1},
        {"term_bias", &zero, PluginFieldType::kINT32, 1}, {"term_weight_format", &format, PluginFieldType::kINT32, 1},
        {"output_activation", &zero, PluginFieldType::kINT32, 1}, {"output_norm", &zero, PluginFieldType::kINT32, 1},
        {"output_norm_bias", &zero, PluginFieldType::kINT32, 1}, {"output_epsilon", &epsilon, PluginFieldType::kFLOAT32, 1},
        {"output_residual", &zero, PluginFieldType::kINT32, 1}, {"output_width", &width, PluginFieldType::kINT32, 1},
        {"dtype", &one, PluginFieldType::kINT32, 1}};

    IPluginV3* create(nvinfer1::IPluginCreatorV3One& creator) {
        const PluginFieldCollection collection{static_cast<int32_t>(fields.size()), fields.data()};
        return creator.createPlugin("linear1", &collection, TensorRTPhase::kBUILD);
    }
};

// One product of K 96 and N 20: its tensors, each a type and sizes, configured. 0: it is taken.
int32_t configured(IPluginV3* plugin, const std::vector<std::pair<DataType, std::vector<int64_t>>>& given) {
    std::vector<nvinfer1::DynamicPluginTensorDesc> tensors(given.size());
    for (size_t i = 0; i < given.size(); ++i) {
        tensors[i].desc.type = given[i].first;
        tensors[i].desc.dims.nbDims = static_cast<int32_t>(given[i].second.size());
        for (size_t d = 0; d < given[i].second.size(); ++d) tensors[i].desc.dims.d[d] = given[i].second[d];
        tensors[i].min = tensors[i].max = tensors[i].desc.dims;
    }
    const auto inputs = static_cast<int32_t>(given.size()) - 1;
    return test::build_of(plugin)->configurePlugin(tensors.data(), inputs, tensors.data() + inputs, 1);
}

void quantised(nvinfer1::IPluginCreatorV3One& creator, test::Logger& logger) {
    Stored stored;
    const std::unique_ptr<IPluginV3> parsed(stored.create(creator));
    expect(parsed != nullptr, "linear: weights as a bundle stores them");
    if (parsed == nullptr) return;
    expect(configured(parsed.get(), {{kT, {1, 1, 96}}, {kI, {20, 3, 4}}, {kT, {20, 3}}, {kT, {1, 1, 20}}}) != 0 &&
               logger.said("build-engine", kName),
        "linear refused: weights that are not packed");
    expect(configured(parsed.get(), {{kT, {1, 1, 96}}, {kI, {20, 3, 8}}, {kT, {20, 3}}, {kT, {1, 1, 20}}}) != 0 &&
               logger.said("[20, 3, 4]", kName),
        "linear refused: stored int8 where int4 is meant");
    const struct {
        int32_t format;
        std::vector<int64_t> right, wrong;
    } packed[] = {{1, {3, 2, 136}, {3, 1, 136}}, {2, {3, 1, 144}, {3, 1, 136}}};
    for (const auto& it : packed) {
        Stored node;
        node.format = it.format, node.width = 20;
        const std::unique_ptr<IPluginV3> plugin(node.create(creator));
        expect(plugin != nullptr &&
                   configured(plugin.get(), {{kT, {2, 1, 96}}, {kI, it.right}, {kT, {2, 1, 20}}}) == 0 &&
                   configured(plugin.get(), {{kT, {2, 1, 96}}, {kI, it.wrong}, {kT, {2, 1, 20}}}) != 0,
            "linear: packed weights of their shape, format " + std::to_string(it.format));
        const PluginFieldCollection* kept = test::runtime_of(plugin.get())->getFieldsToSerialize();
        const std::unique_ptr<IPluginV3> rebuilt(creator.createPlugin("linear1", kept, TensorRTPhase::kRUNTIME));
        expect(rebuilt != nullptr && std::string(test::build_of(plugin.get())->getTimingCacheID()) ==
                                         test::build_of(rebuilt.get())->getTimingCacheID(),
            "linear: packed weights in a plan");
    }
    Stored wrong;
    wrong.format = 5;
    expect(std::unique_ptr<IPluginV3>(wrong.create(creator)) == nullptr && logger.said("term_weight_format", kName),
        "linear refused: an unknown format");
    Stored unsized;
    unsized.format = 2;
    expect(std::unique_ptr<IPluginV3>(unsized.create(creator)) == nullptr && logger.said("output_width", kName),
        "linear refused: packed weights without a width");
}

void lifecycle(nvinfer1::IPluginCreatorV3One& creator, IPluginV3* plugin) {
    const std::unique_ptr<IPluginV3> copy(plugin->clone());
    const std::string identity = test::build_of(plugin)->getTimingCacheID();
    expect(copy != nullptr && identity == test::build_of(copy.get())->getTimingCacheID(), "linear: a clone is the same");
    const PluginFieldCollection* kept = test::runtime_of(copy.get())->getFieldsToSerialize();
    const std::unique_ptr<IPluginV3> rebuilt(creator.createPlugin("linear0", kept, TensorRTPhase::kRUNTIME));
    expect(rebuilt != nullptr && identity == test::build_of(rebuilt.get())->getTimingCacheID(),
        "linear: rebuilt of what a plan keeps");
    bool said = false;
    for (int32_t i = 0; i < kept->nbFields; ++i)
        said = said || (std::string(kept->fields[i].name) == "workspace" &&
                           *static_cast<const int32_t*>(kept->fields[i].data) == 1);
    expect(said, "linear: a plan keeps that it reserves a workspace");
    Node old;
    const PluginFieldCollection before{static_cast<int32_t>(old.fields.size()), old.fields.data()};
    const std::unique_ptr<IPluginV3> of_old_plan(creator.createPlugin("linear0", &before, TensorRTPhase::kRUNTIME));
    expect(of_old_plan != nullptr && identity != test::build_of(of_old_plan.get())->getTimingCacheID(),
        "linear: a plan that does not say so has none");
    Node other;
    other.epsilon[0] = 1.0000001e-5f;
    const std::unique_ptr<IPluginV3> different(other.create(creator));
    expect(different != nullptr && identity != test::build_of(different.get())->getTimingCacheID(),
        "linear: another epsilon is another identity");
}

}  // namespace

void run_linear(test::Runtime& runtime) {
    auto* creator = static_cast<nvinfer1::IPluginCreatorV3One*>(
        runtime.registry().getCreator("DijiangLinear", "1", "dijiang"));
    expect(creator != nullptr, "linear: the creator is there");
    if (creator == nullptr) return;
    const auto refuse = [&](const char* what, const char* text, auto spoil) {
        refused(*creator, runtime.logger, what, text, spoil);
    };
    refuse("a missing field", "dtype is missing", [](Node& n) { n.fields.pop_back(); });
    refuse("an unknown field", "unknown field alpha",
        [](Node& n) { n.fields.emplace_back("alpha", n.epsilon, PluginFieldType::kFLOAT32, 1); });
    refuse("unequal lengths", "term_bias has 2 values; expected 3", [](Node& n) { n.fields[1].length = 2; });
    refuse("too many values", "needs 1 to 4 values", [](Node& n) { n.fields[0].length = 5; });
    refuse("a flag of 2", "output_residual is not possible", [](Node& n) { n.residual[0] = 2; });
    refuse("an unknown activation", "activation", [](Node& n) { n.activation[0] = 6; });
    refuse("SwiGLU of one product", "DIJIANG_SWIGLU", [](Node& n) { n.activation[0] = 5; });
    refuse("terms out of order", "terms[1].output", [](Node& n) { n.term_output[0] = 1, n.term_output[1] = 0; });
    refuse("a term of no output", "terms[2].output", [](Node& n) { n.term_output[2] = 2; });
    refuse("a norm without epsilon", "epsilon", [](Node& n) { n.epsilon[0] = 0.0f; });
    refuse("a norm's bias without norm", "output_norm_bias", [](Node& n) { n.norm_bias[1] = 1; });
    refuse("a plan's own field in a node", "unknown field workspace",
        [](Node& n) { n.fields.emplace_back("workspace", &n.dtype, PluginFieldType::kINT32, 1); });
    refuse("float32", "dtype", [](Node& n) { n.dtype = 0; });
    Node node;
    const std::unique_ptr<IPluginV3> plugin(node.create(*creator));
    expect(plugin != nullptr, "linear: created");
    if (plugin == nullptr) return;
    formats(plugin.get());
    shapes(plugin.get(), runtime.logger);
    lifecycle(*creator, plugin.get());
    quantised(*creator, runtime.logger);
}
