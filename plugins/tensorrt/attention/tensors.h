// The op contract's tensors (docs/op-contract.md) as TensorRT describes them.
#pragma once

#include <NvInferRuntime.h>

#include <string>

#include "attention/attributes.h"
#include "common/tensors.h"

namespace dijiang::trt::attention {

constexpr int32_t kInputs = 10;            // geometric decay
constexpr int32_t kInputsWithTables = 12;  // and gain, read_scale
constexpr int32_t kOutputs = 2;

enum Input {
    kQkv,
    kGate,
    kPastState,
    kPositions,
    kSeqLens,
    kProj,
    kNormWeight,
    kNormBias,
    kInvFreq,
    kLogDecay,
    kGain,
    kReadScale
};
enum Output { kOutput, kPresentState };

// The numbers of one call; a dimension that is not known yet is -1.
struct Call {
    dijiang_geometry geometry{};
    int32_t batch = -1, length = -1;
};

bool right_count(int32_t inputs, int32_t outputs) noexcept;

// supportsFormatCombination for one tensor: `at` counts inputs, then outputs; `first` is tensor 0 (qkv),
// whose type is T.
bool supports(int32_t at, int32_t inputs, int32_t outputs, const nvinfer1::PluginTensorDesc& tensor,
    const nvinfer1::PluginTensorDesc& first) noexcept;

// The type of an output, and its shape. "" or what is wrong with the inputs.
std::string output_type(
    int32_t output, const nvinfer1::DataType* input_types, int32_t inputs, nvinfer1::DataType& type);
std::string output_shape(
    int32_t output, const nvinfer1::DimsExprs* inputs, int32_t input_count, nvinfer1::DimsExprs& shape);

// Checks every shape and type against the attributes and each other; -1 fits any size if `dynamic`.
// tensors: inputs, then outputs. "" or which tensor is wrong, what it is and what it should be.
std::string examine(const Attributes& attributes, const Tensor* tensors, int32_t inputs, int32_t outputs,
    bool dynamic, Call& call);

}  // namespace dijiang::trt::attention
