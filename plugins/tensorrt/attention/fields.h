// Attributes as TensorRT's plugin fields: what a creator advertises, reads, and what a plan keeps.
#pragma once

#include <NvInferRuntime.h>

#include <string>

#include "attention/attributes.h"
#include "common/field_table.h"

namespace dijiang::trt::attention {

constexpr int32_t kAttributeFields = 5;   // what a node gives
constexpr int32_t kSerializedFields = 7;  // and the limits, which only a plan has

FieldPlace field_place(Attributes& attributes, int32_t rule);

// Reads the fields of a node, or of a plan, where the limits may stand as well.
// "" on success, else what is wrong with which field.
std::string read_fields(const nvinfer1::PluginFieldCollection* fields, Attributes& attributes, bool of_plan);

}  // namespace dijiang::trt::attention
