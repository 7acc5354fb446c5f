#include "common/field_table.h"

#include <cstring>

namespace dijiang::trt {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

std::string names(const FieldRule* rules, int32_t count) {
    std::string text;
    for (int32_t i = 0; i < count; ++i) text += (i == 0 ? "" : ", ") + std::string(rules[i].name);
    return text;
}

bool is_lookup_string(const char* name) {
    return std::strcmp(name, "plugin_namespace") == 0 || std::strcmp(name, "plugin_version") == 0;
}

std::string wrong_value(const FieldRule& rule, const PluginField& field) {
    const std::string where = "field " + std::string(rule.name);
    if (field.type != rule.type) {
        return where + " has the wrong type; expected one " +
               (rule.type == PluginFieldType::kINT32 ? "int32" : "float32") + " (field type " +
               std::to_string(static_cast<int32_t>(rule.type)) + "), got field type " +
               std::to_string(static_cast<int32_t>(field.type));
    }
    if (field.data == nullptr || field.length < 1 || field.length > rule.most) {
        return where + " needs " +
               (rule.most == 1 ? "one value" : "1 to " + std::to_string(rule.most) + " values") + ", got " +
               std::to_string(field.data == nullptr ? 0 : field.length);
    }
    return {};
}

}  // namespace

std::string find_fields(const nvinfer1::PluginFieldCollection* given, const FieldRule* rules,
    int32_t required, int32_t known, const PluginField** found) {
    const auto expected = [&] { return "; expected " + names(rules, required); };
    if (given == nullptr || (given->nbFields > 0 && given->fields == nullptr))
        return "no fields" + expected();
    for (int32_t i = 0; i < known; ++i) found[i] = nullptr;
    for (int32_t f = 0; f < given->nbFields; ++f) {
        const PluginField& field = given->fields[f];
        if (field.name == nullptr) return "field " + std::to_string(f) + " has no name" + expected();
        int32_t at = 0;
        while (at < known && std::strcmp(field.name, rules[at].name) != 0) ++at;
        if (at == known) {
            if (is_lookup_string(field.name)) continue;
            return "unknown field " + std::string(field.name) + expected();
        }
        if (found[at] != nullptr) return "field " + std::string(field.name) + " is given twice";
        std::string wrong = wrong_value(rules[at], field);
        if (!wrong.empty()) return wrong;
        found[at] = &field;
    }
    for (int32_t i = 0; i < required; ++i) {
        if (found[i] == nullptr) return "field " + std::string(rules[i].name) + " is missing" + expected();
    }
    return {};
}

}  // namespace dijiang::trt
