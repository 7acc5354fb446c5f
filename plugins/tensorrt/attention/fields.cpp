#include "attention/fields.h"

#include <cstring>

namespace dijiang::trt::attention {
namespace {

using nvinfer1::PluginFieldType;

constexpr FieldRule kRules[kSerializedFields] = {
    {"num_heads", PluginFieldType::kINT32, 1},
    {"num_kv_heads", PluginFieldType::kINT32, 1},
    {"head_dim", PluginFieldType::kINT32, 1},
    {"rotary_dim", PluginFieldType::kINT32, 1},
    {"epsilon", PluginFieldType::kFLOAT32, 1},
    {"max_batch", PluginFieldType::kINT32, 1},
    {"max_length", PluginFieldType::kINT32, 1},
};

}  // namespace

FieldPlace field_place(Attributes& a, int32_t rule) {
    void* const at[kSerializedFields] = {&a.num_heads, &a.num_kv_heads, &a.head_dim, &a.rotary_dim, &a.epsilon,
        &a.limits.max_batch, &a.limits.max_length};
    return {&kRules[rule], at[rule], 1};
}

std::string read_fields(const nvinfer1::PluginFieldCollection* fields, Attributes& attributes, bool of_plan) {
    const int32_t known = of_plan ? kSerializedFields : kAttributeFields;
    const nvinfer1::PluginField* found[kSerializedFields];
    const std::string wrong = find_fields(fields, kRules, kAttributeFields, known, found);
    if (!wrong.empty()) return wrong;
    for (int32_t i = 0; i < known; ++i)
        if (found[i] != nullptr) std::memcpy(field_place(attributes, i).data, found[i]->data, 4);
    if (attributes.limits.max_batch < 0 || attributes.limits.max_length < 0)
        return "max_batch and max_length must not be negative";
    return {};
}

}  // namespace dijiang::trt::attention
