#include "v3/attention_plugin.h"

#include <memory>

#include "common/guard.h"
#include "common/log.h"

namespace dijiang::trt {
PluginV3::PluginV3(const Attributes& attributes, const Limits& limits)
    : layer_(attributes, limits), identity_(describe(attributes)) {}

int32_t PluginV3::report(const std::string& wrong) const noexcept {
    return wrong.empty() ? 0 : fail(wrong, recorder_);
}

nvinfer1::IPluginCapability* PluginV3::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
    switch (type) {
        case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
        case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
        case nvinfer1::PluginCapabilityType::kRUNTIME:
            return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

nvinfer1::IPluginV3* PluginV3::clone() noexcept {
    try {
        auto copy = std::make_unique<PluginV3>(layer_.attributes(), layer_.limits());
        copy->inputs_ = inputs_;
        copy->recorder_ = recorder_;
        return copy.release();
    } catch (const std::exception& error) {
        fail(std::string("cannot clone: ") + error.what(), recorder_);
        return nullptr;
    }
}

int32_t PluginV3::getOutputDataTypes(nvinfer1::DataType* types, int32_t outputs,
    const nvinfer1::DataType* input_types, int32_t inputs) const noexcept {
    return report(text_of([&] { return output_types(input_types, inputs, types, outputs); }));
}

int32_t PluginV3::getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count,
    const nvinfer1::DimsExprs*, int32_t, nvinfer1::DimsExprs* outputs, int32_t output_count,
    nvinfer1::IExprBuilder&) noexcept {
    return report(text_of([&]() -> std::string {
        if (!right_count(input_count, output_count)) {
            return "got " + std::to_string(input_count) + " inputs; expected 10, or 12 with trained tables";
        }
        if (inputs[kGate].nbDims != 3 || inputs[kPastState].nbDims != 4) {
            return "gate has " + std::to_string(inputs[kGate].nbDims) + " dimensions and past_state " +
                   std::to_string(inputs[kPastState].nbDims) + "; expected 3 and 4";
        }
        outputs[kOutput] = inputs[kGate];
        outputs[kPresentState] = inputs[kPastState];
        return {};
    }));
}

bool PluginV3::supportsFormatCombination(
    int32_t at, const nvinfer1::DynamicPluginTensorDesc* tensors, int32_t inputs, int32_t outputs) noexcept {
    return supports(at, inputs, outputs, tensors[at].desc, tensors[kQkv].desc);
}

int32_t PluginV3::configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, int32_t inputs,
    const nvinfer1::DynamicPluginTensorDesc* out, int32_t outputs) noexcept {
    return report(text_of([&] { return layer_.configure(in, inputs, out, outputs); }));
}

size_t PluginV3::getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* in, int32_t inputs,
    const nvinfer1::DynamicPluginTensorDesc* out, int32_t outputs) const noexcept {
    size_t bytes = 0;
    // The return value cannot say that this failed; enqueue meets the same error and can.
    report(text_of([&] {
        Call call;
        const std::string wrong = examine_largest(layer_.attributes(), in, inputs, out, outputs, call);
        return wrong.empty() ? Layer::workspace_of_plan(call, bytes) : wrong;
    }));
    return bytes;
}

int32_t PluginV3::onShapeChange(const nvinfer1::PluginTensorDesc* in, int32_t inputs,
    const nvinfer1::PluginTensorDesc* out, int32_t outputs) noexcept {
    inputs_ = inputs;
    return report(text_of([&] { return layer_.prepare(in, inputs, out, outputs); }));
}

int32_t PluginV3::enqueue(const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc* out,
    const void* const* data, void* const* results, void* workspace, cudaStream_t stream) noexcept {
    return report(text_of([&] { return layer_.run(in, out, inputs_, data, results, workspace, stream); }));
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
    return serialized_.set(layer_.attributes(), layer_.limits());
}

}  // namespace dijiang::trt
