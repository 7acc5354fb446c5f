// A plugin for TensorRT 8.6 (IPluginV2DynamicExt), whichever its layer (common/layer.h).
#pragma once

#include <NvInferRuntime.h>

#include <memory>
#include <string>

#include "common/guard.h"
#include "common/log.h"
#include "common/names.h"

namespace dijiang::trt {

template <typename Layer>
class PluginV2 final : public nvinfer1::IPluginV2DynamicExt {
public:
    explicit PluginV2(const Layer& layer) : layer_(layer) {}

    const char* getPluginType() const noexcept override { return Layer::kName; }
    const char* getPluginVersion() const noexcept override { return kPluginVersion; }
    void setPluginNamespace(const char* name) noexcept override {
        report(text_of([&]() -> std::string {
            namespace_ = name == nullptr ? "" : name;
            return {};
        }));
    }
    const char* getPluginNamespace() const noexcept override { return namespace_.c_str(); }
    int32_t getNbOutputs() const noexcept override { return layer_.outputs(); }

    nvinfer1::IPluginV2DynamicExt* clone() const noexcept override {
        try {
            auto copy = std::make_unique<PluginV2>(layer_);
            copy->namespace_ = namespace_;
            copy->unfit_ = unfit_;
            return copy.release();
        } catch (const std::exception& error) {
            failed(std::string("cannot clone: ") + error.what());
            return nullptr;
        }
    }
    void destroy() noexcept override { delete this; }

    nvinfer1::DimsExprs getOutputDimensions(int32_t output, const nvinfer1::DimsExprs* inputs, int32_t input_count,
        nvinfer1::IExprBuilder& builder) noexcept override {
        nvinfer1::DimsExprs dims{};
        if (report(text_of([&] { return layer_.output_shape(output, inputs, input_count, builder, dims); })) != 0)
            dims.nbDims = -1;  // TensorRT's sign of an invalid shape
        return dims;
    }
    nvinfer1::DataType getOutputDataType(
        int32_t output, const nvinfer1::DataType* input_types, int32_t inputs) const noexcept override {
        auto type = nvinfer1::DataType::kFLOAT;
        // Inputs that do not fit are refused by supportsFormatCombination: here nothing can be.
        text_of([&] { return layer_.output_type(output, input_types, inputs, type); });
        return type;
    }
    bool supportsFormatCombination(int32_t at, const nvinfer1::PluginTensorDesc* tensors, int32_t inputs,
        int32_t outputs) noexcept override {
        return layer_.supports(at, inputs, outputs, tensors[at], tensors[0]);
    }
    // Called while the engine is built, with sizes that may be unknown, and by an execution context when its sizes
    // change.
    void configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, int32_t inputs,
        const nvinfer1::DynamicPluginTensorDesc* out, int32_t outputs) noexcept override {
        unfit_ = text_of([&]() -> std::string {
            std::string wrong = layer_.configure(in, inputs, out, outputs);
            return wrong.empty() ? layer_.reserve() : wrong;
        });
        report(unfit_);
    }
    // With the largest sizes of the profile that TensorRT plans for.
    size_t getWorkspaceSize(const nvinfer1::PluginTensorDesc* in, int32_t inputs, const nvinfer1::PluginTensorDesc* out,
        int32_t outputs) const noexcept override {
        size_t bytes = 0;
        // The return value cannot say that this failed; enqueue meets the same error and can.
        report(text_of([&] { return layer_.workspace(in, inputs, out, outputs, bytes); }));
        return bytes;
    }

    int32_t initialize() noexcept override {
        return report(text_of([&] { return layer_.reserve(); }));
    }
    void terminate() noexcept override { layer_.release(); }
    // A copy for a new execution context. Where all sizes are fixed it is not configured, and so reserves here.
    void attachToContext(cudnnContext*, cublasContext*, nvinfer1::IGpuAllocator*) noexcept override {
        const std::string wrong = text_of([&] { return layer_.reserve(); });
        if (report(wrong) != 0) unfit_ = wrong;
    }
    int32_t enqueue(const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc* out,
        const void* const* data, void* const* results, void* workspace, cudaStream_t stream) noexcept override {
        if (!unfit_.empty()) return failed(unfit_);
        return report(text_of([&] { return layer_.run(in, out, data, results, workspace, stream); }));
    }

    size_t getSerializationSize() const noexcept override { return blob_size(layer_.attributes()); }
    void serialize(void* buffer) const noexcept override {
        write_blob(layer_.attributes(), static_cast<unsigned char*>(buffer));
    }

private:
    static int32_t failed(const std::string& wrong) noexcept { return fail(wrong, nullptr, Layer::kName); }
    static int32_t report(const std::string& wrong) noexcept { return wrong.empty() ? 0 : failed(wrong); }

    Layer layer_;
    std::string namespace_ = kPluginNamespace;
    std::string unfit_;  // why the latest configuration cannot run; configurePlugin has no way to say it
};

}  // namespace dijiang::trt
