// A plugin for TensorRT 10.3 and newer (IPluginV3), whichever its layer (common/layer.h).
#pragma once

#include <NvInferRuntime.h>

#include <memory>
#include <string>

#include "common/guard.h"
#include "common/log.h"
#include "common/names.h"

namespace dijiang::trt {

// TensorRT 10.3 .. 11.x share these interfaces. I/O aliasing (IPluginV3OneBuildV2) is left out on purpose: a declared
// alias makes the compiler copy the state in every layer; the runtime binds past and present to one buffer instead,
// which the kernels are safe under.
template <typename Layer>
class PluginV3 final : public nvinfer1::IPluginV3,
                       public nvinfer1::IPluginV3OneCore,
                       public nvinfer1::IPluginV3OneBuild,
                       public nvinfer1::IPluginV3OneRuntime {
public:
    explicit PluginV3(const Layer& layer) : layer_(layer), identity_(describe(layer.attributes())) {}

    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
        switch (type) {
            case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
            case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
            case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }
    PluginV3* clone() noexcept override {
        try {
            auto copy = std::make_unique<PluginV3>(layer_);
            copy->recorder_ = recorder_;
            return copy.release();
        } catch (const std::exception& error) {
            fail(std::string("cannot clone: ") + error.what(), recorder_, Layer::kName);
            return nullptr;
        }
    }

    // Core
    const char* getPluginName() const noexcept override { return Layer::kName; }
    const char* getPluginVersion() const noexcept override { return kPluginVersion; }
    const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }

    // Build
    int32_t getNbOutputs() const noexcept override { return layer_.outputs(); }
    int32_t getOutputDataTypes(nvinfer1::DataType* types, int32_t outputs, const nvinfer1::DataType* input_types,
        int32_t inputs) const noexcept override {
        return report(text_of([&]() -> std::string {
            std::string wrong = wrong_count(outputs);
            for (int32_t o = 0; o < outputs && wrong.empty(); ++o)
                wrong = layer_.output_type(o, input_types, inputs, types[o]);
            return wrong;
        }));
    }
    int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count, const nvinfer1::DimsExprs*, int32_t,
        nvinfer1::DimsExprs* outputs, int32_t output_count, nvinfer1::IExprBuilder& builder) noexcept override {
        return report(text_of([&]() -> std::string {
            std::string wrong = wrong_count(output_count);
            for (int32_t o = 0; o < output_count && wrong.empty(); ++o)
                wrong = layer_.output_shape(o, inputs, input_count, builder, outputs[o]);
            return wrong;
        }));
    }
    bool supportsFormatCombination(int32_t at, const nvinfer1::DynamicPluginTensorDesc* tensors, int32_t inputs,
        int32_t outputs) noexcept override {
        return layer_.supports(at, inputs, outputs, tensors[at].desc, tensors[0].desc);
    }
    int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, int32_t inputs,
        const nvinfer1::DynamicPluginTensorDesc* out, int32_t outputs) noexcept override {
        return report(text_of([&] { return layer_.configure(in, inputs, out, outputs); }));
    }
    size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* in, int32_t inputs,
        const nvinfer1::DynamicPluginTensorDesc* out, int32_t outputs) const noexcept override {
        size_t bytes = 0;
        // The return value cannot say that this failed; enqueue meets the same error and can.
        report(text_of([&] { return layer_.workspace(in, inputs, out, outputs, bytes); }));
        return bytes;
    }
    const char* getTimingCacheID() noexcept override { return identity_.c_str(); }
    const char* getMetadataString() noexcept override { return identity_.c_str(); }

    // Runtime
    int32_t onShapeChange(const nvinfer1::PluginTensorDesc* in, int32_t inputs, const nvinfer1::PluginTensorDesc* out,
        int32_t outputs) noexcept override {
        return report(text_of([&] { return layer_.prepare(in, inputs, out, outputs); }));
    }
    int32_t enqueue(const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc* out,
        const void* const* data, void* const* results, void* workspace, cudaStream_t stream) noexcept override {
        return report(text_of([&] { return layer_.run(in, out, data, results, workspace, stream); }));
    }
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override {
        std::unique_ptr<PluginV3> copy(clone());
        if (copy == nullptr) return nullptr;
        copy->recorder_ = context == nullptr ? nullptr : context->getErrorRecorder();
        return copy->report(text_of([&] { return copy->layer_.reserve(); })) == 0 ? copy.release() : nullptr;
    }
    const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override {
        return serialized_.of_plan(layer_.attributes());
    }

private:
    // Returns 0 if `wrong` is empty, else reports it and returns an error.
    int32_t report(const std::string& wrong) const noexcept {
        return wrong.empty() ? 0 : fail(wrong, recorder_, Layer::kName);
    }
    std::string wrong_count(int32_t outputs) const {
        if (outputs == layer_.outputs()) return {};
        return "got " + std::to_string(outputs) + " outputs; expected " + std::to_string(layer_.outputs());
    }

    Layer layer_;
    std::string identity_;  // equal attributes, equal identity
    typename Layer::Fields serialized_;
    nvinfer1::IErrorRecorder* recorder_ = nullptr;  // of the execution context, which outlives this object
};

}  // namespace dijiang::trt
