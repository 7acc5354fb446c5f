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

// Where the values of each rule are.
struct Addresses {
    explicit Addresses(Attributes& a)
        : at{a.term_output, a.term_bias, a.output_activation, a.output_norm, a.output_norm_bias, a.output_epsilon,
              a.output_residual, &a.dtype, a.term_weight_format, a.output_width, &a.workspace} {}

    void* at[kFields];
};

int32_t length_of(const Attributes& attributes, int32_t rule) {
    if (rule == kDtype || rule == kWorkspace) return 1;
    return rule <= kTermBias || rule == kTermWeightFormat ? attributes.terms : attributes.outputs;
}

}  // namespace

const nvinfer1::PluginFieldCollection* field_names() noexcept { return advertised<kRules, kNodeFields>(); }

std::string read_fields(const nvinfer1::PluginFieldCollection* fields, Attributes& attributes, bool of_plan) {
    const PluginField* found[kFields] = {};
    const std::string wrong = find_fields(fields, kRules, kRequiredFields, of_plan ? kFields : kNodeFields, found);
    if (!wrong.empty()) return wrong;
    attributes = {};
    attributes.terms = found[kTermOutput]->length;
    attributes.outputs = found[kOutputActivation]->length;
    const Addresses addresses(attributes);
    for (int32_t i = 0; i < kFields; ++i) {
        if (found[i] == nullptr) continue;
        const int32_t length = length_of(attributes, i);
        if (found[i]->length != length)
            return "field " + std::string(kRules[i].name) + " has " + std::to_string(found[i]->length) +
                   " values; expected " + std::to_string(length);
        std::memcpy(addresses.at[i], found[i]->data, 4 * static_cast<size_t>(length));
    }
    if (!of_plan) attributes.workspace = kReserved;
    return {};
}

const nvinfer1::PluginFieldCollection* SerializedFields::set(const Attributes& attributes) noexcept {
    attributes_ = attributes;
    const Addresses addresses(attributes_);
    list_.clear();
    for (int32_t i = 0; i < kFields; ++i) list_.add(kRules[i], addresses.at[i], length_of(attributes_, i));
    return list_.get();
}

}  // namespace dijiang::trt::linear
