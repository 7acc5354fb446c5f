// DijiangAttention: check, size and run one layer.
#pragma once

#include <NvInferRuntime.h>

#include <string>

#include "attention/attributes.h"
#include "attention/fields.h"
#include "attention/tensors.h"
#include "common/layer.h"
#include "common/sync_memory.h"

namespace dijiang::trt::attention {

class Layer : public LayerBase<Attributes, kAttributeFields, kSerializedFields> {
public:
    static constexpr const char* kName = attention::kName;

    using LayerBase::LayerBase;

    int32_t outputs() const { return kOutputs; }
    std::string output_type(
        int32_t output, const nvinfer1::DataType* input_types, int32_t inputs, nvinfer1::DataType& type) const {
        return attention::output_type(output, input_types, inputs, type);
    }
    std::string output_shape(int32_t output, const nvinfer1::DimsExprs* inputs, int32_t input_count,
        nvinfer1::IExprBuilder&, nvinfer1::DimsExprs& shape) const {
        return attention::output_shape(output, inputs, input_count, shape);
    }
    bool supports(int32_t at, int32_t inputs, int32_t outputs, const nvinfer1::PluginTensorDesc& tensor,
        const nvinfer1::PluginTensorDesc& first) const {
        return attention::supports(at, inputs, outputs, tensor, first);
    }

    // Widens the limits by the largest call that the configuration allows.
    std::string configure(const nvinfer1::DynamicPluginTensorDesc* in, int32_t inputs,
        const nvinfer1::DynamicPluginTensorDesc* out, int32_t outputs);
    std::string prepare(const nvinfer1::PluginTensorDesc* in, int32_t inputs,
        const nvinfer1::PluginTensorDesc* out, int32_t outputs);

    // Whatever the type of the largest call; nothing if that is unknown.
    std::string reserve();
    void release() noexcept { sync_.release(); }

    // For calls of up to this size on the GPU at hand; and for a plan, on every GPU that it may run on.
    std::string workspace(const nvinfer1::PluginTensorDesc* in, int32_t inputs,
        const nvinfer1::PluginTensorDesc* out, int32_t outputs, size_t& bytes) const;
    std::string workspace(const nvinfer1::DynamicPluginTensorDesc* in, int32_t inputs,
        const nvinfer1::DynamicPluginTensorDesc* out, int32_t outputs, size_t& bytes) const;

    std::string run(const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc* out,
        const void* const* data, void* const* results, void* workspace, cudaStream_t stream) const;

private:
    std::string reserve(const dijiang_geometry& geometry);

    SyncMemory sync_;
    int32_t inputs_ = 0;  // of the latest sizes; a call is not told
};

}  // namespace dijiang::trt::attention
