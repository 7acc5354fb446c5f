// What a DijiangLinear layer carries besides its tensors. No TensorRT header here.
#pragma once

#include <string>

#include "dijiang/linear.h"

namespace dijiang::trt::linear {

constexpr char kName[] = "DijiangLinear";
constexpr int32_t kMostTerms = DIJIANG_LINEAR_MAX_TERMS, kMostOutputs = DIJIANG_LINEAR_MAX_OUTPUTS;
// A term has an input, weights and perhaps scales and a bias; an output perhaps a norm's two tensors and a residual.
constexpr int32_t kMostInputs = 4 * kMostTerms + 3 * kMostOutputs;

// term_weight_format beyond dijiang_weight_format: weights as bundles store them, with scales of their own. A node of
// an ONNX file has these; build-engine packs them. TensorRT's parser makes layers of them, but none is built.
constexpr int32_t kStoredInt8 = 3, kStoredInt4 = 4;
// term_bias: 0, none; 1, a bias; this one, a bias whose numbers are all of T.
constexpr int32_t kRoundedBias = 2;
constexpr int32_t kReserved = 1, kAlignment = 256;

constexpr bool is_stored(int32_t format) { return format == kStoredInt8 || format == kStoredInt4; }

// The fields of docs/tensorrt-plugin.md; entries beyond the counts are 0.
struct Attributes {
    int32_t terms = 0, outputs = 0;
    int32_t dtype = 0;
    int32_t term_output[kMostTerms] = {}, term_bias[kMostTerms] = {}, term_weight_format[kMostTerms] = {};
    int32_t output_activation[kMostOutputs] = {}, output_norm[kMostOutputs] = {};
    int32_t output_norm_bias[kMostOutputs] = {}, output_residual[kMostOutputs] = {};
    int32_t output_width[kMostOutputs] = {};  // N of packed weights; 0: the weight has a row for each
    float output_epsilon[kMostOutputs] = {};
    // What the plan reserves: 0, no workspace, as plans of plugins had none once; kReserved, dijiang_linear_workspace_size
    // of the largest call and kAlignment.
    int32_t workspace = 0;
};

// The C ABI's call of a layer with these attributes, its sizes and pointers still to be filled in.
dijiang_linear_call call_of(const Attributes& attributes);

// An A100, which stands for the GPU where there is none; the one at hand has its say when sizes are exact.
dijiang_device reference_device();

// "" if the kernels can do such a layer on some GPU, else what is wrong with it.
std::string why_unsupported(const Attributes& attributes);

// One line, the same for equal attributes.
std::string describe(const Attributes& attributes);

}  // namespace dijiang::trt::linear
