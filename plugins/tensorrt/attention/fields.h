// Attributes as TensorRT's plugin fields: what a creator advertises, reads, and what a plan keeps.
#pragma once

#include <NvInferRuntime.h>

#include <string>

#include "attention/attributes.h"
#include "common/field_table.h"

namespace dijiang::trt {

constexpr int32_t kAttributeFields = 5;   // what a node gives
constexpr int32_t kSerializedFields = 7;  // and the limits, which only a plan has

// Names and types of a node's fields, in the contract's order. Static storage.
const nvinfer1::PluginFieldCollection* field_names() noexcept;

// Reads the fields of a node, or of a plan (with `limits` not null, where the limits may stand as well).
// "" on success, else what is wrong with which field. Unknown fields are refused, but for the two strings by
// which parsers look a plugin up and which some hand on as fields.
std::string read_fields(
    const nvinfer1::PluginFieldCollection* fields, Attributes& attributes, Limits* limits);

// The fields that a plan keeps. They point into this object, which therefore neither moves nor is copied.
class SerializedFields {
public:
    const nvinfer1::PluginFieldCollection* set(const Attributes& attributes, const Limits& limits) noexcept;

private:
    Attributes attributes_;
    Limits limits_;
    FieldList<kSerializedFields> list_;
};

}  // namespace dijiang::trt
