// DijiangLinear: check and run one layer.
#pragma once

#include <NvInferRuntime.h>

#include <string>

#include "common/layer.h"
#include "common/tensors.h"
#include "linear/attributes.h"
#include "linear/fields.h"

namespace dijiang::trt::linear {

// What a tensor at a place is; places count inputs, then outputs.
enum class Kind { input, weight, scale, bias, norm_weight, norm_bias, residual, output };
struct Place {
    Kind kind;
    int32_t index;  // of its term, or of its output
};

// The order of tensors. Weights, biases and norms come from constant layers: the network is made by this
// project, which binds nothing else to them, so that a launch may read them before earlier work has ended.
// Weights are int32, which no version of TensorRT converts or copies: two elements each, or the bytes of a packed
// weight, [tiles, chunks, words of a chunk]. Biases and norms are float32, which is what constants are to the kernels
// and to TensorRT 8.6.
class Layer : public LayerBase<Attributes, kNodeFields, kFields> {
public:
    static constexpr const char* kName = linear::kName;

    explicit Layer(const Attributes& attributes);

    int32_t outputs() const { return attributes_.outputs; }
    std::string output_type(int32_t, const nvinfer1::DataType*, int32_t, nvinfer1::DataType& type) const {
        type = this->type();
        return {};
    }
    std::string output_shape(int32_t output, const nvinfer1::DimsExprs* inputs, int32_t input_count,
        nvinfer1::IExprBuilder& builder, nvinfer1::DimsExprs& shape) const;
    bool supports(int32_t at, int32_t inputs, int32_t outputs, const nvinfer1::PluginTensorDesc& tensor,
        const nvinfer1::PluginTensorDesc& first) const;

    std::string configure(const nvinfer1::DynamicPluginTensorDesc* in, int32_t inputs,
        const nvinfer1::DynamicPluginTensorDesc* out, int32_t outputs) const;
    std::string prepare(const nvinfer1::PluginTensorDesc* in, int32_t inputs, const nvinfer1::PluginTensorDesc* out,
        int32_t outputs) const;

    // For calls of these sizes, and smaller ones; asks no GPU.
    std::string workspace(const nvinfer1::PluginTensorDesc* in, int32_t inputs, const nvinfer1::PluginTensorDesc* out,
        int32_t outputs, size_t& bytes) const;
    std::string workspace(const nvinfer1::DynamicPluginTensorDesc* in, int32_t inputs,
        const nvinfer1::DynamicPluginTensorDesc* out, int32_t outputs, size_t& bytes) const;

    std::string run(const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc* out,
        const void* const* data, void* const* results, void* workspace, cudaStream_t stream) const;

private:
    int32_t input_of(int32_t output) const;   // the place of an output's first input
    int32_t weight_of(int32_t output) const;  // and of its first weight, whose rows are its width
    nvinfer1::DataType type() const;          // T
    nvinfer1::DataType type_at(int32_t at) const;
    // Checks shapes and types and fills in the sizes; -1 fits any size if `dynamic`.
    template <typename Look>
    std::string examine(int32_t inputs, int32_t outputs, bool dynamic, Look look, dijiang_linear_call& call) const;
    template <typename Look>
    std::string workspace(int32_t inputs, int32_t outputs, Look look, size_t& bytes) const;
    std::string name(int32_t at) const;
    // The shape of a weight of N rows of K elements, where both are known, and what is wrong otherwise.
    bool agree_weight(int32_t term, const nvinfer1::Dims& dims, int64_t& n, int64_t& k, bool dynamic,
        std::string& right) const;

    Place places_[kMostInputs + kMostOutputs];
    int32_t inputs_ = 0;
};

}  // namespace dijiang::trt::linear
