#include "linear/fields.h"

#include <cstring>

namespace dijiang::trt::linear {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

constexpr FieldRule kRules[kFields] = {
    {"term_output", PluginFieldType::kINT32, kMostTerms},
    {"term_bias", PluginFieldType::kINT32, kMostTerms},
    {"output_activation", PluginFieldType::kINT32, kMostOutputs},
    {"output_norm", PluginFieldType::kINT32, kMostOutputs},
    {"output_norm_bias", PluginFieldType::kINT32, kMostOutputs},
    {"output_epsilon", PluginFieldType::kFLOAT32, kMostOutputs},
    {"output_residual", PluginFieldType::kINT32, kMostOutputs},
    {"dtype", PluginFieldType::kINT32, 1},
    {"term_weight_format", PluginFieldType::kINT32, kMostTerms},
    {"output_width", PluginFieldType::kINT32, kMostOutputs},
    {"workspace", PluginFieldType::kINT32, 1},
};
enum Rule { kTermOutput, kTermBias, kOutputActivation, kDtype = 7, kTermWeightFormat, kWorkspace = 10 };

int32_t length_of(const Attributes& attributes, int32_t rule) {
    if (rule == kDtype || rule == kWorkspace) return 1;
    return rule <= kTermBias || rule == kTermWeightFormat ? attributes.terms : attributes.outputs;
}

}  // namespace

FieldPlace field_place(Attributes& a, int32_t rule) {
    void* const at[kFields] = {a.term_output, a.term_bias, a.output_activation, a.output_norm, a.output_norm_bias,
        a.output_epsilon, a.output_residual, &a.dtype, a.term_weight_format, a.output_width, &a.workspace};
    return {&kRules[rule], at[rule], length_of(a, rule)};
}

std::string read_fields(const nvinfer1::PluginFieldCollection* fields, Attributes& attributes, bool of_plan) {
    const PluginField* found[kFields] = {};
    const std::string wrong = find_fields(fields, kRules, kRequiredFields, of_plan ? kFields : kNodeFields, found);
    if (!wrong.empty()) return wrong;
    attributes = {};
    attributes.terms = found[kTermOutput]->length;
    attributes.outputs = found[kOutputActivation]->length;
    for (int32_t i = 0; i < kFields; ++i) {
        if (found[i] == nullptr) continue;
        const FieldPlace it = field_place(attributes, i);
        if (found[i]->length != it.length)
            return "field " + std::string(it.rule->name) + " has " + std::to_string(found[i]->length) +
                   " values; expected " + std::to_string(it.length);
        std::memcpy(it.data, found[i]->data, 4 * static_cast<size_t>(it.length));
    }
    if (!of_plan) attributes.workspace = kReserved;
    return {};
}

}  // namespace dijiang::trt::linear
