#include "v2/linear_plugin.h"

#include <memory>

#include "common/guard.h"
#include "common/log.h"
#include "v2/linear_blob.h"

namespace dijiang::trt::linear {
namespace {

int32_t failed(const std::string& wrong) noexcept { return fail(wrong, nullptr, kName); }
int32_t report(const std::string& wrong) noexcept { return wrong.empty() ? 0 : failed(wrong); }

}  // namespace

void PluginV2::setPluginNamespace(const char* name) noexcept {
    report(text_of([&]() -> std::string {
        namespace_ = name == nullptr ? "" : name;
        return {};
    }));
}

nvinfer1::IPluginV2DynamicExt* PluginV2::clone() const noexcept {
    try {
        auto copy = std::make_unique<PluginV2>(layer_.attributes());
        copy->namespace_ = namespace_;
        copy->unfit_ = unfit_;
        return copy.release();
    } catch (const std::exception& error) {
        failed(std::string("cannot clone: ") + error.what());
        return nullptr;
    }
}

nvinfer1::DimsExprs PluginV2::getOutputDimensions(int32_t output, const nvinfer1::DimsExprs* inputs,
    int32_t input_count, nvinfer1::IExprBuilder& builder) noexcept {
    nvinfer1::DimsExprs dims{};
    dims.nbDims = -1;  // TensorRT's sign of an invalid shape
    if (output < 0 || output >= layer_.outputs() || input_count != layer_.inputs()) {
        failed("got " + std::to_string(input_count) + " inputs; expected " + std::to_string(layer_.inputs()));
        return dims;
    }
    const nvinfer1::DimsExprs& weight = inputs[layer_.weight_of(output)];
    if (inputs[layer_.input_of(output)].nbDims != 3 || weight.nbDims < 2) {
        failed("the input of output " + std::to_string(output) + " does not have 3 dimensions, or its weight not 2 or 3");
        return dims;
    }
    dims = inputs[layer_.input_of(output)];
    const int32_t width = layer_.attributes().output_width[output];
    dims.d[2] = width > 0 ? builder.constant(width) : weight.d[0];
    return dims;
}

// Called while the engine is built, with sizes that may be unknown, and by an execution context when its sizes
// change.
void PluginV2::configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, int32_t inputs,
    const nvinfer1::DynamicPluginTensorDesc* out, int32_t outputs) noexcept {
    unfit_ = text_of([&] { return layer_.configure(in, inputs, out, outputs); });
    report(unfit_);
}

// With the largest sizes of the profile that TensorRT plans for.
size_t PluginV2::getWorkspaceSize(const nvinfer1::PluginTensorDesc* in, int32_t inputs,
    const nvinfer1::PluginTensorDesc* out, int32_t outputs) const noexcept {
    size_t bytes = 0;
    // The return value cannot say that this failed; enqueue meets the same error and can.
    report(text_of([&] { return layer_.workspace(in, inputs, out, outputs, bytes); }));
    return bytes;
}

int32_t PluginV2::enqueue(const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc* out,
    const void* const* data, void* const* results, void* workspace, cudaStream_t stream) noexcept {
    if (!unfit_.empty()) return failed(unfit_);
    return report(text_of([&] { return layer_.run(in, out, data, results, workspace, stream); }));
}

size_t PluginV2::getSerializationSize() const noexcept { return kBlobSize; }

void PluginV2::serialize(void* buffer) const noexcept {
    write_blob(layer_.attributes(), static_cast<unsigned char*>(buffer));
}

}  // namespace dijiang::trt::linear
