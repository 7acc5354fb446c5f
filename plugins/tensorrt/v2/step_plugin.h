// DijiangStep for TensorRT 8.6 (IPluginV2DynamicExt).
#pragma once

#include <NvInferRuntime.h>

#include <string>

#include "common/names.h"
#include "step/layer.h"

namespace dijiang::trt::step {

class PluginV2 final : public nvinfer1::IPluginV2DynamicExt {
public:
    explicit PluginV2(const Attributes& attributes) : layer_(attributes) {}

    const char* getPluginType() const noexcept override { return kName; }
    const char* getPluginVersion() const noexcept override { return kPluginVersion; }
    void setPluginNamespace(const char* name) noexcept override;
    const char* getPluginNamespace() const noexcept override { return namespace_.c_str(); }
    int32_t getNbOutputs() const noexcept override { return layer_.outputs(); }

    nvinfer1::IPluginV2DynamicExt* clone() const noexcept override;
    void destroy() noexcept override { delete this; }

    nvinfer1::DimsExprs getOutputDimensions(int32_t output, const nvinfer1::DimsExprs* inputs, int32_t input_count,
        nvinfer1::IExprBuilder& builder) noexcept override;
    nvinfer1::DataType getOutputDataType(int32_t, const nvinfer1::DataType*, int32_t) const noexcept override {
        return nvinfer1::DataType::kFLOAT;
    }
    bool supportsFormatCombination(int32_t at, const nvinfer1::PluginTensorDesc* tensors, int32_t inputs,
        int32_t outputs) noexcept override {
        return layer_.supports(at, inputs, outputs, tensors[at], tensors[kInputIds].type);
    }
    void configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, int32_t inputs,
        const nvinfer1::DynamicPluginTensorDesc* out, int32_t outputs) noexcept override;
    size_t getWorkspaceSize(const nvinfer1::PluginTensorDesc*, int32_t, const nvinfer1::PluginTensorDesc*,
        int32_t) const noexcept override {
        return 0;
    }

    int32_t initialize() noexcept override;
    void terminate() noexcept override { layer_.release(); }
    void attachToContext(cudnnContext* cudnn, cublasContext* cublas, nvinfer1::IGpuAllocator* allocator) noexcept override;
    int32_t enqueue(const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc* out,
        const void* const* data, void* const* results, void* workspace, cudaStream_t stream) noexcept override;

    size_t getSerializationSize() const noexcept override;
    void serialize(void* buffer) const noexcept override;

private:
    Layer layer_;
    std::string namespace_ = kPluginNamespace;
    std::string unfit_;  // why the latest configuration cannot run; configurePlugin has no way to say it
};

}  // namespace dijiang::trt::step
