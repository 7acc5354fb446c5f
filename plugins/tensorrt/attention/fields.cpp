#include "attention/fields.h"

#include <cstring>

namespace dijiang::trt {
namespace {

using nvinfer1::PluginFieldCollection;
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

// Where the value of each rule is.
struct Addresses {
    Addresses(Attributes& attributes, Limits& limits)
        : at{&attributes.num_heads, &attributes.num_kv_heads, &attributes.head_dim, &attributes.rotary_dim,
              &attributes.epsilon, &limits.max_batch, &limits.max_length} {}

    void* at[kSerializedFields];
};

}  // namespace

const PluginFieldCollection* field_names() noexcept { return advertised<kRules, kAttributeFields>(); }

std::string read_fields(const PluginFieldCollection* fields, Attributes& attributes, Limits* limits) {
    Limits unused;
    const int32_t known = limits == nullptr ? kAttributeFields : kSerializedFields;
    const nvinfer1::PluginField* found[kSerializedFields];
    const std::string wrong = find_fields(fields, kRules, kAttributeFields, known, found);
    if (!wrong.empty()) return wrong;
    const Addresses addresses(attributes, limits == nullptr ? unused : *limits);
    for (int32_t i = 0; i < known; ++i)
        if (found[i] != nullptr) std::memcpy(addresses.at[i], found[i]->data, 4);
    if (limits != nullptr && (limits->max_batch < 0 || limits->max_length < 0))
        return "max_batch and max_length must not be negative";
    return {};
}

const PluginFieldCollection* SerializedFields::set(
    const Attributes& attributes, const Limits& limits) noexcept {
    attributes_ = attributes;
    limits_ = limits;
    const Addresses addresses(attributes_, limits_);
    list_.clear();
    for (int32_t i = 0; i < kSerializedFields; ++i) list_.add(kRules[i], addresses.at[i], 1);
    return list_.get();
}

}  // namespace dijiang::trt
