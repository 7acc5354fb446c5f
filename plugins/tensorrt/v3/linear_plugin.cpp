#include "v3/linear_plugin.h"

#include <memory>

#include "common/guard.h"
#include "common/log.h"

namespace dijiang::trt::linear {

PluginV3::PluginV3(const Attributes& attributes) : layer_(attributes), identity_(describe(attributes)) {}

int32_t PluginV3::report(const std::string& wrong) const noexcept { return wrong.empty() ? 0 : fail(wrong, recorder_, kName); }

nvinfer1::IPluginCapability* PluginV3::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
    switch (type) {
        case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
        case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
        case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

nvinfer1::IPluginV3* PluginV3::clone() noexcept {
    try {
        auto copy = std::make_unique<PluginV3>(layer_.attributes());
        copy->recorder_ = recorder_;
        return copy.release();
    } catch (const std::exception& error) {
        fail(std::string("cannot clone: ") + error.what(), recorder_, kName);
        return nullptr;
    }
}

int32_t PluginV3::getOutputDataTypes(
    nvinfer1::DataType* types, int32_t outputs, const nvinfer1::DataType*, int32_t) const noexcept {
    for (int32_t o = 0; o < outputs; ++o) types[o] = layer_.type();
    return 0;
}

int32_t PluginV3::getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count, const nvinfer1::DimsExprs*,
    int32_t, nvinfer1::DimsExprs* outputs, int32_t output_count, nvinfer1::IExprBuilder& builder) noexcept {
    return report(text_of([&]() -> std::string {
        if (input_count != layer_.inputs() || output_count != layer_.outputs())
            return "got " + std::to_string(input_count) + " inputs; expected " + std::to_string(layer_.inputs());
        for (int32_t o = 0; o < output_count; ++o) {
            const nvinfer1::DimsExprs &input = inputs[layer_.input_of(o)], &weight = inputs[layer_.weight_of(o)];
            if (input.nbDims != 3 || weight.nbDims < 2)
                return "the input of output " + std::to_string(o) + " has " + std::to_string(input.nbDims) +
                       " dimensions and its weight " + std::to_string(weight.nbDims) + "; expected 3 and 2 or 3";
            outputs[o] = input;
            const int32_t width = layer_.attributes().output_width[o];
            outputs[o].d[2] = width > 0 ? builder.constant(width) : weight.d[0];
        }
        return {};
    }));
}

int32_t PluginV3::configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, int32_t inputs,
    const nvinfer1::DynamicPluginTensorDesc* out, int32_t outputs) noexcept {
    return report(text_of([&] { return layer_.configure(in, inputs, out, outputs); }));
}

size_t PluginV3::getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* in, int32_t inputs,
    const nvinfer1::DynamicPluginTensorDesc* out, int32_t outputs) const noexcept {
    size_t bytes = 0;
    // The return value cannot say that this failed; enqueue meets the same error and can.
    report(text_of([&] { return layer_.workspace_of_largest(in, inputs, out, outputs, bytes); }));
    return bytes;
}

int32_t PluginV3::onShapeChange(const nvinfer1::PluginTensorDesc* in, int32_t inputs,
    const nvinfer1::PluginTensorDesc* out, int32_t outputs) noexcept {
    return report(text_of([&] { return layer_.prepare(in, inputs, out, outputs); }));
}

int32_t PluginV3::enqueue(const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc* out,
    const void* const* data, void* const* results, void* workspace, cudaStream_t stream) noexcept {
    return report(text_of([&] { return layer_.run(in, out, data, results, workspace, stream); }));
}

nvinfer1::IPluginV3* PluginV3::attachToContext(nvinfer1::IPluginResourceContext* context) noexcept {
    auto* copy = static_cast<PluginV3*>(clone());
    if (copy != nullptr) copy->recorder_ = context == nullptr ? nullptr : context->getErrorRecorder();
    return copy;
}

const nvinfer1::PluginFieldCollection* PluginV3::getFieldsToSerialize() noexcept {
    return serialized_.set(layer_.attributes());
}

}  // namespace dijiang::trt::linear
