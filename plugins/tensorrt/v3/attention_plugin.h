// DijiangAttention for TensorRT 10.3 and newer (IPluginV3).
#pragma once

#include <NvInferRuntime.h>

#include <string>

#include "attention/fields.h"
#include "attention/layer.h"
#include "common/names.h"

namespace dijiang::trt {

// TensorRT 10.3 .. 11.x share these interfaces. I/O aliasing (IPluginV3OneBuildV2) is left out on purpose: a
// declared alias makes the compiler copy the state in every layer; the runtime binds past and present to one
// buffer instead, which the kernels are safe under.
class PluginV3 final : public nvinfer1::IPluginV3,
                       public nvinfer1::IPluginV3OneCore,
                       public nvinfer1::IPluginV3OneBuild,
                       public nvinfer1::IPluginV3OneRuntime {
public:
    explicit PluginV3(const Attributes& attributes, const Limits& limits = {});

    nvinfer1::IPluginCapability* getCapabilityInterface(
        nvinfer1::PluginCapabilityType type) noexcept override;
    nvinfer1::IPluginV3* clone() noexcept override;

    const char* getPluginName() const noexcept override { return kPluginName; }
    const char* getPluginVersion() const noexcept override { return kPluginVersion; }
    const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }

    int32_t getNbOutputs() const noexcept override { return kOutputs; }
    int32_t getOutputDataTypes(nvinfer1::DataType* types, int32_t outputs,
        const nvinfer1::DataType* input_types, int32_t inputs) const noexcept override;
    int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count,
        const nvinfer1::DimsExprs* values, int32_t value_count, nvinfer1::DimsExprs* outputs,
        int32_t output_count, nvinfer1::IExprBuilder& builder) noexcept override;
    bool supportsFormatCombination(int32_t at, const nvinfer1::DynamicPluginTensorDesc* tensors,
        int32_t inputs, int32_t outputs) noexcept override;
    int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, int32_t inputs,
        const nvinfer1::DynamicPluginTensorDesc* out, int32_t outputs) noexcept override;
    size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* in, int32_t inputs,
        const nvinfer1::DynamicPluginTensorDesc* out, int32_t outputs) const noexcept override;
    const char* getTimingCacheID() noexcept override { return identity_.c_str(); }
    const char* getMetadataString() noexcept override { return identity_.c_str(); }

    int32_t onShapeChange(const nvinfer1::PluginTensorDesc* in, int32_t inputs,
        const nvinfer1::PluginTensorDesc* out, int32_t outputs) noexcept override;
    int32_t enqueue(const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc* out,
        const void* const* data, void* const* results, void* workspace,
        cudaStream_t stream) noexcept override;
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
    const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override;

private:
    // Returns 0 if `wrong` is empty, else reports it and returns an error.
    int32_t report(const std::string& wrong) const noexcept;

    Layer layer_;
    std::string identity_;  // equal attributes, equal identity
    SerializedFields serialized_;
    int32_t inputs_ = 0;                            // of the latest onShapeChange; enqueue is not told
    nvinfer1::IErrorRecorder* recorder_ = nullptr;  // of the execution context, which outlives this object
};

}  // namespace dijiang::trt
