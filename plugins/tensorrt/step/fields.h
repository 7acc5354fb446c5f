// DijiangStep's attributes as TensorRT's plugin fields: what its creator advertises, reads, and a plan keeps.
#pragma once

#include <NvInferRuntime.h>

#include <string>

#include "common/field_table.h"
#include "step/attributes.h"

namespace dijiang::trt::step {

constexpr int32_t kFields = kReals + kIntegers + 1;  // and weight_formats

FieldPlace field_place(Attributes& attributes, int32_t rule);

// "" on success, else what is wrong with which field. weight_formats alone need not be given: a single 0 then. Nodes
// and plans have the same fields.
std::string read_fields(const nvinfer1::PluginFieldCollection* fields, Attributes& attributes, bool of_plan);

}  // namespace dijiang::trt::step
