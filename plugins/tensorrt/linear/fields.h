// DijiangLinear's attributes as TensorRT's plugin fields: what its creator advertises, reads, and a plan keeps.
#pragma once

#include <NvInferRuntime.h>

#include <string>

#include "common/field_table.h"
#include "linear/attributes.h"

namespace dijiang::trt::linear {

// The others than the required are 0 where they are not given; the last is a plan's alone, and not advertised.
constexpr int32_t kFields = 11, kNodeFields = 10, kRequiredFields = 8;

FieldPlace field_place(Attributes& attributes, int32_t rule);

// "" on success, else what is wrong with which field. of_plan: the fields are those that a plan keeps; else of a node,
// whose plan is yet to be built.
std::string read_fields(const nvinfer1::PluginFieldCollection* fields, Attributes& attributes, bool of_plan);

}  // namespace dijiang::trt::linear
