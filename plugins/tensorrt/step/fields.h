// DijiangStep's attributes as TensorRT's plugin fields: what its creator advertises, reads, and a plan keeps.
#pragma once

#include <NvInferRuntime.h>

#include <string>

#include "common/field_table.h"
#include "step/attributes.h"

namespace dijiang::trt::step {

constexpr int32_t kNodeFields = kReals + kIntegers + 1, kFields = kNodeFields + 1;  // weight_formats; a plan's packing

FieldPlace field_place(Attributes& attributes, int32_t rule);

// "" on success, else what is wrong with which field. weight_formats need not be given: a single 0 then. of_plan: the fields
// are those that a plan keeps, of quantised weights in the order that this library packs.
std::string read_fields(const nvinfer1::PluginFieldCollection* fields, Attributes& attributes, bool of_plan);

}  // namespace dijiang::trt::step
