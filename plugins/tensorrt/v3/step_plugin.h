// DijiangStep for TensorRT 10.3 and newer (IPluginV3).
#pragma once

#include <NvInferRuntime.h>

#include <string>

#include "common/names.h"
#include "step/fields.h"
#include "step/layer.h"

namespace dijiang::trt::step {

class PluginV3 final : public nvinfer1::IPluginV3,
                       public nvinfer1::IPluginV3OneCore,
                       public nvinfer1::IPluginV3OneBuild,
                       public nvinfer1::IPluginV3OneRuntime {
public:
    explicit PluginV3(const Attributes& attributes);

    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
    nvinfer1::IPluginV3* clone() noexcept override;

    // Core
    const char* getPluginName() const noexcept override { return kName; }
    const char* getPluginVersion() const noexcept override { return kPluginVersion; }
    const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }

    // Build
    int32_t getNbOutputs() const noexcept override { return layer_.outputs(); }
    int32_t getOutputDataTypes(nvinfer1::DataType* types, int32_t outputs, const nvinfer1::DataType* input_types,
        int32_t inputs) const noexcept override;
    int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count,
        const nvinfer1::DimsExprs* shape_inputs, int32_t shape_input_count, nvinfer1::DimsExprs* outputs,
        int32_t output_count, nvinfer1::IExprBuilder& builder) noexcept override;
    bool supportsFormatCombination(int32_t at, const nvinfer1::DynamicPluginTensorDesc* tensors, int32_t inputs,
        int32_t outputs) noexcept override {
        return layer_.supports(at, inputs, outputs, tensors[at].desc, tensors[kInputIds].desc.type);
    }
    int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, int32_t inputs,
        const nvinfer1::DynamicPluginTensorDesc* out, int32_t outputs) noexcept override;
    size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc*, int32_t, const nvinfer1::DynamicPluginTensorDesc*,
        int32_t) const noexcept override {
        return 0;
    }
    const char* getTimingCacheID() noexcept override { return identity_.c_str(); }

    // Runtime
    int32_t onShapeChange(const nvinfer1::PluginTensorDesc* in, int32_t inputs, const nvinfer1::PluginTensorDesc* out,
        int32_t outputs) noexcept override;
    int32_t enqueue(const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc* out,
        const void* const* data, void* const* results, void* workspace, cudaStream_t stream) noexcept override;
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
    const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override;

private:
    int32_t report(const std::string& wrong) const noexcept;

    Layer layer_;
    std::string identity_;
    SerializedFields serialized_;
    nvinfer1::IErrorRecorder* recorder_ = nullptr;  // of the execution context, if it has one
};

}  // namespace dijiang::trt::step
