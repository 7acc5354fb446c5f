#include "step/fields.h"

#include <cstring>

namespace dijiang::trt::step {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

constexpr PluginFieldType kInteger = PluginFieldType::kINT32, kReal = PluginFieldType::kFLOAT32;

// Reals, then integers in their order: so that those that need not be given are the last.
constexpr FieldRule kRules[kFields] = {
    {"norm_epsilon", kReal, 1},
    {"group_norm_epsilon", kReal, 1},
    {"layers", kInteger, 1},
    {"hidden", kInteger, 1},
    {"inner", kInteger, 1},
    {"vocabulary", kInteger, 1},
    {"num_heads", kInteger, 1},
    {"num_kv_heads", kInteger, 1},
    {"head_dim", kInteger, 1},
    {"rotary_dim", kInteger, 1},
    {"dtype", kInteger, 1},
    {"norm", kInteger, 1},
    {"activation", kInteger, 1},
    {"parallel_residual", kInteger, 1},
    {"table_rows", kInteger, 1},
    {"position_rows", kInteger, 1},
    {"position_offset", kInteger, 1},
    {"rows", kInteger, 1},
    {"blocks", kInteger, 1},
    {"weight_formats", kInteger, kMostFormats},
    {"packing", kInteger, 1},
};
constexpr int32_t kWeightFormats = kNodeFields - 1, kRequired = kWeightFormats, kPacking = kFields - 1;

}  // namespace

FieldPlace field_place(Attributes& attributes, int32_t rule) {
    if (rule < kReals) return {&kRules[rule], reals(attributes).at[rule], 1};
    if (rule < kWeightFormats) return {&kRules[rule], integers(attributes).at[rule - kReals], 1};
    if (rule == kPacking) return {&kRules[rule], &attributes.packing, 1};
    return {&kRules[rule], attributes.weight_formats, attributes.formats};
}

std::string read_fields(const nvinfer1::PluginFieldCollection* fields, Attributes& attributes, bool of_plan) {
    const PluginField* found[kFields] = {};
    const std::string wrong = find_fields(fields, kRules, kRequired, of_plan ? kFields : kNodeFields, found);
    if (!wrong.empty()) return wrong;
    attributes = {};
    if (found[kWeightFormats] != nullptr) attributes.formats = found[kWeightFormats]->length;
    for (int32_t i = 0; i < kFields; ++i) {
        const FieldPlace it = field_place(attributes, i);
        if (found[i] != nullptr) std::memcpy(it.data, found[i]->data, 4 * static_cast<size_t>(it.length));
    }
    std::string impossible = take_formats(attributes);
    if (!impossible.empty() || !of_plan || attributes.model.quantised == 0) return impossible;
    const int32_t packing = found[kPacking] == nullptr ? 1 : attributes.packing;
    if (packing == DIJIANG_STEP_PACKING) return {};
    return "the plan's quantised weights are packed in the order of another version of this plugin; got packing " +
           std::to_string(packing) + "; expected " + std::to_string(DIJIANG_STEP_PACKING) +
           ": build the engine again with this plugin";
}

}  // namespace dijiang::trt::step
