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

// Where a field's value is.
struct FieldPlace {
    const FieldRule* rule;
    void* data;
    int32_t length;
};

// Those of a plugin. Attributes' namespace has a field_place(Attributes&, int32_t) for each: NodeFields that a node may
// have, then what only a plan has.
template <typename Attributes, int32_t NodeFields, int32_t AllFields>
class Fields {
public:
    // Names, types and most lengths of a node's, in the table's order. Static storage.
    static const nvinfer1::PluginFieldCollection* of_node() noexcept {
        static FieldList<NodeFields> list;
        static const nvinfer1::PluginFieldCollection* const made = [] {
            Attributes none;
            for (int32_t i = 0; i < NodeFields; ++i) {
                const FieldRule& rule = *field_place(none, i).rule;
                list.add(rule, nullptr, rule.most);
            }
            return list.get();
        }();
        return made;
    }

    // What a plan keeps. It points into this object, which therefore neither moves nor is copied.
    const nvinfer1::PluginFieldCollection* of_plan(const Attributes& attributes) noexcept {
        attributes_ = attributes;
        list_.clear();
        for (int32_t i = 0; i < AllFields; ++i) {
            const FieldPlace it = field_place(attributes_, i);
            list_.add(*it.rule, it.data, it.length);
        }
        return list_.get();
    }

private:
    Attributes attributes_;
    FieldList<AllFields> list_;
};

}  // namespace dijiang::trt
