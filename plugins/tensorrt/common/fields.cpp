#include "fields.h"

#include <cstring>

namespace dijiang::trt {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;

struct Entry {
    const char* name;
    PluginFieldType type;
    int32_t Attributes::* integer;
    float Attributes::* real;
    int32_t Limits::* limit;
};

constexpr Entry kEntries[kSerializedFields] = {
    {"num_heads", PluginFieldType::kINT32, &Attributes::num_heads, nullptr, nullptr},
    {"num_kv_heads", PluginFieldType::kINT32, &Attributes::num_kv_heads, nullptr, nullptr},
    {"head_dim", PluginFieldType::kINT32, &Attributes::head_dim, nullptr, nullptr},
    {"rotary_dim", PluginFieldType::kINT32, &Attributes::rotary_dim, nullptr, nullptr},
    {"epsilon", PluginFieldType::kFLOAT32, nullptr, &Attributes::epsilon, nullptr},
    {"max_batch", PluginFieldType::kINT32, nullptr, nullptr, &Limits::max_batch},
    {"max_length", PluginFieldType::kINT32, nullptr, nullptr, &Limits::max_length},
};

const void* address(const Entry& entry, const Attributes& attributes, const Limits& limits) {
    if (entry.integer != nullptr) return &(attributes.*entry.integer);
    if (entry.real != nullptr) return &(attributes.*entry.real);
    return &(limits.*entry.limit);
}

void* address(const Entry& entry, Attributes& attributes, Limits& limits) {
    return const_cast<void*>(address(entry, const_cast<const Attributes&>(attributes), limits));
}

std::string names() {
    std::string text;
    for (int32_t i = 0; i < kAttributeFields; ++i)
        text += (i == 0 ? "" : ", ") + std::string(kEntries[i].name);
    return text;
}

bool is_lookup_string(const char* name) {
    return std::strcmp(name, "plugin_namespace") == 0 || std::strcmp(name, "plugin_version") == 0;
}

}  // namespace

const PluginFieldCollection* field_names() noexcept {
    static const std::array<PluginField, kAttributeFields> fields = [] {
        std::array<PluginField, kAttributeFields> made{};
        for (int32_t i = 0; i < kAttributeFields; ++i) {
            made[i] = PluginField(kEntries[i].name, nullptr, kEntries[i].type, 1);
        }
        return made;
    }();
    static const PluginFieldCollection collection{kAttributeFields, fields.data()};
    return &collection;
}

std::string read_fields(const PluginFieldCollection* fields, Attributes& attributes, Limits* limits) {
    if (fields == nullptr || (fields->nbFields > 0 && fields->fields == nullptr)) {
        return "no fields; expected " + names();
    }
    Limits unused;
    const int32_t known = limits == nullptr ? kAttributeFields : kSerializedFields;
    bool seen[kSerializedFields] = {};
    for (int32_t f = 0; f < fields->nbFields; ++f) {
        const PluginField& field = fields->fields[f];
        if (field.name == nullptr) return "field " + std::to_string(f) + " has no name; expected " + names();
        int32_t at = 0;
        while (at < known && std::strcmp(field.name, kEntries[at].name) != 0) ++at;
        if (at == known) {
            if (is_lookup_string(field.name)) continue;
            return "unknown field " + std::string(field.name) + "; expected " + names();
        }
        const Entry& entry = kEntries[at];
        const std::string where = "field " + std::string(field.name);
        if (seen[at]) return where + " is given twice";
        if (field.type != entry.type) {
            return where + " has the wrong type; expected one " +
                   (entry.type == PluginFieldType::kINT32 ? "int32" : "float32") + " (field type " +
                   std::to_string(static_cast<int32_t>(entry.type)) + "), got field type " +
                   std::to_string(static_cast<int32_t>(field.type));
        }
        if (field.length != 1 || field.data == nullptr) {
            return where + " needs one value, got " +
                   std::to_string(field.data == nullptr ? 0 : field.length);
        }
        std::memcpy(address(entry, attributes, limits == nullptr ? unused : *limits), field.data, 4);
        seen[at] = true;
    }
    for (int32_t i = 0; i < kAttributeFields; ++i) {
        if (!seen[i]) return "field " + std::string(kEntries[i].name) + " is missing; expected " + names();
    }
    if (limits != nullptr && (limits->max_batch < 0 || limits->max_length < 0)) {
        return "max_batch and max_length must not be negative";
    }
    return {};
}

const PluginFieldCollection* SerializedFields::set(
    const Attributes& attributes, const Limits& limits) noexcept {
    attributes_ = attributes;
    limits_ = limits;
    for (int32_t i = 0; i < kSerializedFields; ++i) {
        const Entry& entry = kEntries[i];
        fields_[i] = PluginField(
            entry.name, address(entry, const_cast<const Attributes&>(attributes_), limits_), entry.type, 1);
    }
    collection_.nbFields = kSerializedFields;
    collection_.fields = fields_.data();
    return &collection_;
}

}  // namespace dijiang::trt
