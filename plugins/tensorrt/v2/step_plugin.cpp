#include "v2/step_plugin.h"

#include <memory>

#include "common/guard.h"
#include "common/log.h"
#include "v2/step_blob.h"

namespace dijiang::trt::step {
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
    if (output != kLogits) return inputs[kPastStates + output - kPresentStates];
    if (inputs[kInputIds].nbDims != 2) {
        failed("input_ids has " + std::to_string(inputs[kInputIds].nbDims) + " dimensions; expected 2");
        return dims;
    }
    dims = inputs[kInputIds];
    dims.nbDims = 3;
    dims.d[2] = builder.constant(layer_.attributes().model.vocabulary);
    return dims;
}

// Called while the engine is built, with sizes that may be unknown, and by an execution context when its sizes
// change.
void PluginV2::configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, int32_t inputs,
    const nvinfer1::DynamicPluginTensorDesc* out, int32_t outputs) noexcept {
    unfit_ = text_of([&]() -> std::string {
        std::string wrong = layer_.configure(in, inputs, out, outputs);
        return wrong.empty() ? layer_.reserve() : wrong;
    });
    report(unfit_);
}

int32_t PluginV2::initialize() noexcept {
    return report(text_of([&] { return layer_.reserve(); }));
}

// A copy for a new execution context. Where all sizes are fixed it is not configured, and so reserves here.
void PluginV2::attachToContext(cudnnContext*, cublasContext*, nvinfer1::IGpuAllocator*) noexcept {
    const std::string wrong = text_of([&] { return layer_.reserve(); });
    if (report(wrong) != 0) unfit_ = wrong;
}

int32_t PluginV2::enqueue(const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc* out,
    const void* const* data, void* const* results, void*, cudaStream_t stream) noexcept {
    if (!unfit_.empty()) return failed(unfit_);
    return report(text_of([&] { return layer_.run(in, out, data, results, stream); }));
}

size_t PluginV2::getSerializationSize() const noexcept { return kBlobSize; }

void PluginV2::serialize(void* buffer) const noexcept {
    write_blob(layer_.attributes(), static_cast<unsigned char*>(buffer));
}

}  // namespace dijiang::trt::step
