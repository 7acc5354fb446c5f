// DijiangStep's attributes as TensorRT's plugin fields: what its creator advertises, reads, and a plan keeps.
#pragma once

#include <NvInferRuntime.h>

#include <string>

#include "common/field_table.h"
#include "step/attributes.h"

namespace dijiang::trt::step {

constexpr int32_t kFields = kIntegers + kReals;

const nvinfer1::PluginFieldCollection* field_names() noexcept;

// "" on success, else what is wrong with which field. weight_formats alone need not be given: 0 then.
std::string read_fields(const nvinfer1::PluginFieldCollection* fields, Attributes& attributes);

// The fields that a plan keeps. They point into this object, which therefore neither moves nor is copied.
class SerializedFields {
public:
    const nvinfer1::PluginFieldCollection* set(const Attributes& attributes) noexcept;

private:
    Attributes attributes_;
    FieldList<kFields> list_;
};

}  // namespace dijiang::trt::step
