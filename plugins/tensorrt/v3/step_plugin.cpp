#include "v3/step_plugin.h"

#include <memory>

#include "common/guard.h"
#include "common/log.h"

namespace dijiang::trt::step {

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
    for (int32_t o = 0; o < outputs; ++o) types[o] = nvinfer1::DataType::kFLOAT;
    return 0;
}

int32_t PluginV3::getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count, const nvinfer1::DimsExprs*,
    int32_t, nvinfer1::DimsExprs* outputs, int32_t output_count, nvinfer1::IExprBuilder& builder) noexcept {
    return report(text_of([&]() -> std::string {
        if (input_count != layer_.inputs() || output_count != layer_.outputs())
            return "got " + std::to_string(input_count) + " inputs; expected " + std::to_string(layer_.inputs());
        const nvinfer1::DimsExprs& ids = inputs[kInputIds];
        if (ids.nbDims != 2) return "input_ids has " + std::to_string(ids.nbDims) + " dimensions; expected 2";
        outputs[kLogits] = ids;
        outputs[kLogits].nbDims = 3;
        outputs[kLogits].d[2] = builder.constant(layer_.attributes().model.vocabulary);
        for (int32_t layer = 0; layer < layer_.attributes().model.layers; ++layer)
            outputs[kPresentStates + layer] = inputs[kPastStates + layer];
        return {};
    }));
}

int32_t PluginV3::configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, int32_t inputs,
    const nvinfer1::DynamicPluginTensorDesc* out, int32_t outputs) noexcept {
    return report(text_of([&] { return layer_.configure(in, inputs, out, outputs); }));
}

int32_t PluginV3::onShapeChange(const nvinfer1::PluginTensorDesc* in, int32_t inputs,
    const nvinfer1::PluginTensorDesc* out, int32_t outputs) noexcept {
    return report(text_of([&]() -> std::string {
        std::string wrong = layer_.examine(in, inputs, out, outputs);
        return wrong.empty() ? layer_.reserve() : wrong;
    }));
}

int32_t PluginV3::enqueue(const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc* out,
    const void* const* data, void* const* results, void*, cudaStream_t stream) noexcept {
    return report(text_of([&] { return layer_.run(in, out, data, results, stream); }));
}

nvinfer1::IPluginV3* PluginV3::attachToContext(nvinfer1::IPluginResourceContext* context) noexcept {
    auto* copy = static_cast<PluginV3*>(clone());
    if (copy == nullptr) return nullptr;
    copy->recorder_ = context == nullptr ? nullptr : context->getErrorRecorder();
    if (copy->report(text_of([&] { return copy->layer_.reserve(); })) == 0) return copy;
    delete copy;
    return nullptr;
}

const nvinfer1::PluginFieldCollection* PluginV3::getFieldsToSerialize() noexcept {
    return serialized_.set(layer_.attributes());
}

}  // namespace dijiang::trt::step
