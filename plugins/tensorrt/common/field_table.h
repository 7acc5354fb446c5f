// TensorRT's plugin fields, read and written by a table of what a plugin has.
#pragma once

#include <NvInferRuntime.h>

#include <array>
#include <string>

namespace dijiang::trt {

struct FieldRule {
    const char* name;
    nvinfer1::PluginFieldType type;  // kINT32 or kFLOAT32: four bytes a value
    int32_t most;                    // values; there is at least one
};

// Finds the field of each of `known` rules among what TensorRT gives: found[i], null if it is not there. The
// first `required` rules must be. "" or what is wrong with which field. Unknown fields are refused, but for
// the two strings by which parsers look a plugin up and which some hand on as fields.
std::string find_fields(const nvinfer1::PluginFieldCollection* given, const FieldRule* rules,
    int32_t required, int32_t known, const nvinfer1::PluginField** found);

// Fields as TensorRT takes them. What it gives out points into it, so it neither moves nor is copied.
template <int32_t Most>
class FieldList {
public:
    FieldList() = default;
    FieldList(const FieldList&) = delete;
    FieldList& operator=(const FieldList&) = delete;

    void clear() noexcept { collection_.nbFields = 0; }
    void add(const FieldRule& rule, const void* data, int32_t length) noexcept {
        fields_[collection_.nbFields++] = nvinfer1::PluginField(rule.name, data, rule.type, length);
    }
    const nvinfer1::PluginFieldCollection* get() noexcept {
        collection_.fields = fields_.data();
        return &collection_;
    }

private:
    std::array<nvinfer1::PluginField, Most> fields_{};
    nvinfer1::PluginFieldCollection collection_{};
};

// Names, types and most lengths of a node's fields, in the table's order. Static storage: one for each table.
template <const FieldRule* Rules, int32_t Count>
const nvinfer1::PluginFieldCollection* advertised() noexcept {
    static FieldList<Count> list;
    static const nvinfer1::PluginFieldCollection* const made = [] {
        for (int32_t i = 0; i < Count; ++i) list.add(Rules[i], nullptr, Rules[i].most);
        return list.get();
    }();
    return made;
}

}  // namespace dijiang::trt
