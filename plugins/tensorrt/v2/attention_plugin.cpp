#include "v2/attention_plugin.h"

#include <memory>

#include "common/guard.h"
#include "common/log.h"
#include "v2/attention_blob.h"

namespace dijiang::trt {
namespace {

int32_t report(const std::string& wrong) noexcept { return wrong.empty() ? 0 : fail(wrong); }

}  // namespace

void PluginV2::setPluginNamespace(const char* name) noexcept {
    report(text_of([&]() -> std::string {
        namespace_ = name == nullptr ? "" : name;
        return {};
    }));
}

nvinfer1::IPluginV2DynamicExt* PluginV2::clone() const noexcept {
    try {
        auto copy = std::make_unique<PluginV2>(layer_.attributes(), layer_.limits());
        copy->namespace_ = namespace_;
        copy->inputs_ = inputs_;
        copy->unfit_ = unfit_;
        return copy.release();
    } catch (const std::exception& error) {
        fail(std::string("cannot clone: ") + error.what());
        return nullptr;
    }
}

nvinfer1::DimsExprs PluginV2::getOutputDimensions(int32_t output, const nvinfer1::DimsExprs* inputs,
    int32_t input_count, nvinfer1::IExprBuilder&) noexcept {
    if (right_count(input_count, kOutputs) && output >= 0 && output < kOutputs) {
        return inputs[output == kOutput ? kGate : kPastState];
    }
    fail("got " + std::to_string(input_count) + " inputs; expected 10, or 12 with trained tables");
    nvinfer1::DimsExprs none{};
    none.nbDims = -1;  // TensorRT's sign of an invalid shape
    return none;
}

nvinfer1::DataType PluginV2::getOutputDataType(
    int32_t output, const nvinfer1::DataType* input_types, int32_t inputs) const noexcept {
    // Types that do not fit are refused by supportsFormatCombination; here T is whatever qkv is.
    return output == kOutput && inputs > 0 ? input_types[kQkv] : nvinfer1::DataType::kFLOAT;
}

bool PluginV2::supportsFormatCombination(
    int32_t at, const nvinfer1::PluginTensorDesc* tensors, int32_t inputs, int32_t outputs) noexcept {
    return supports(at, inputs, outputs, tensors[at], tensors[kQkv]);
}

// Called while the engine is built, with sizes that may be unknown, and by an execution context when its
// sizes change.
void PluginV2::configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, int32_t inputs,
    const nvinfer1::DynamicPluginTensorDesc* out, int32_t outputs) noexcept {
    inputs_ = inputs;
    unfit_ = text_of([&]() -> std::string {
        std::string wrong = layer_.configure(in, inputs, out, outputs);
        return wrong.empty() ? layer_.reserve() : wrong;
    });
    report(unfit_);
}

size_t PluginV2::getWorkspaceSize(const nvinfer1::PluginTensorDesc* in, int32_t inputs,
    const nvinfer1::PluginTensorDesc* out, int32_t outputs) const noexcept {
    size_t bytes = 0;
    // The return value cannot say that this failed; enqueue meets the same error and can.
    report(text_of([&] {
        Call call;
        const std::string wrong = examine(layer_.attributes(), in, inputs, out, outputs, call);
        return wrong.empty() ? Layer::workspace(call, bytes) : wrong;
    }));
    return bytes;
}

int32_t PluginV2::initialize() noexcept {
    return report(text_of([&] { return layer_.reserve(); }));
}

int32_t PluginV2::enqueue(const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc* out,
    const void* const* data, void* const* results, void* workspace, cudaStream_t stream) noexcept {
    if (!unfit_.empty()) return fail(unfit_);
    return report(text_of([&] { return layer_.run(in, out, inputs_, data, results, workspace, stream); }));
}

size_t PluginV2::getSerializationSize() const noexcept { return kBlobSize; }

void PluginV2::serialize(void* buffer) const noexcept {
    write_blob(layer_.attributes(), layer_.limits(), static_cast<unsigned char*>(buffer));
}

}  // namespace dijiang::trt
