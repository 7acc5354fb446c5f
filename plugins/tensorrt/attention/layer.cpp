#include "attention/layer.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>

#include "attention/ahead.h"
#include "common/texts.h"

namespace dijiang::trt::attention {
namespace {

using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;

// Checks the tensors that `look` finds.
template <typename Look>
std::string examine(
    const Attributes& attributes, int32_t inputs, int32_t outputs, Look look, bool dynamic, Call& call) {
    std::array<Tensor, kInputsWithTables + kOutputs> tensors{};
    if (right_count(inputs, outputs))
        for (int32_t at = 0; at < inputs + outputs; ++at) tensors[at] = look(at);
    return examine(attributes, tensors.data(), inputs, outputs, dynamic, call);
}

// A call's exact sizes.
std::string examine(const Attributes& attributes, const PluginTensorDesc* in, int32_t inputs,
    const PluginTensorDesc* out, int32_t outputs, Call& call) {
    return examine(attributes, inputs, outputs, tensors_of(in, inputs, out), false, call);
}

// Sizes that may be unknown; the call's batch and length are the largest that qkv may have (its `max`, or what is
// there).
std::string examine_largest(const Attributes& attributes, const DynamicPluginTensorDesc* in, int32_t inputs,
    const DynamicPluginTensorDesc* out, int32_t outputs, Call& call) {
    const std::string wrong = examine(attributes, inputs, outputs, tensors_of(in, inputs, out), true, call);
    if (!wrong.empty()) return wrong;
    const nvinfer1::Dims& largest = in[kQkv].max;
    if (largest.nbDims != 3) return {};
    if (largest.d[0] > INT32_MAX || largest.d[1] > INT32_MAX)
        return "the profile allows 2^31 rows or tokens, or more";
    call.batch = std::max(call.batch, static_cast<int32_t>(largest.d[0]));
    call.length = std::max(call.length, static_cast<int32_t>(largest.d[1]));
    return {};
}

std::string workspace_here(const Call& call, size_t& bytes) {
    bytes = 0;
    if (call.batch <= 0 || call.length <= 0) return {};
    return status_text(
        dijiang_attention_workspace_size(&call.geometry, call.batch, call.length, nullptr, &bytes));
}

std::string cuda_text(cudaError_t error, const char* what) {
    return error == cudaSuccess ? std::string() : std::string(what) + ": " + cudaGetErrorString(error);
}

}  // namespace

std::string Layer::configure(
    const DynamicPluginTensorDesc* in, int32_t inputs, const DynamicPluginTensorDesc* out, int32_t outputs) {
    inputs_ = inputs;
    Call largest;
    const std::string wrong = examine_largest(attributes_, in, inputs, out, outputs, largest);
    if (wrong.empty()) attributes_.limits.include(largest.batch, largest.length);
    return wrong;
}

std::string Layer::prepare(
    const PluginTensorDesc* in, int32_t inputs, const PluginTensorDesc* out, int32_t outputs) {
    inputs_ = inputs;
    Call call;
    const std::string wrong = examine(attributes_, in, inputs, out, outputs, call);
    if (!wrong.empty()) return wrong;
    attributes_.limits.include(call.batch, call.length);
    return reserve(call.geometry);
}

std::string Layer::reserve(const dijiang_geometry& geometry) {
    const Limits& limits = attributes_.limits;
    if (limits.max_batch <= 0 || limits.max_length <= 0) return {};
    size_t bytes = 0;
    const dijiang_status status =
        dijiang_attention_sync_size(&geometry, limits.max_batch, limits.max_length, nullptr, &bytes);
    return status == DIJIANG_OK ? sync_.reserve(bytes) : status_text(status);
}

std::string Layer::reserve() {
    for (const dijiang_dtype dtype : {DIJIANG_FLOAT32, DIJIANG_FLOAT16, DIJIANG_BFLOAT16}) {
        std::string wrong = reserve(geometry_of(attributes_, dtype, 0));
        if (!wrong.empty()) return wrong;
    }
    return {};
}

std::string Layer::workspace(const PluginTensorDesc* in, int32_t inputs, const PluginTensorDesc* out,
    int32_t outputs, size_t& bytes) const {
    Call call;
    const std::string wrong = examine(attributes_, in, inputs, out, outputs, call);
    return wrong.empty() ? workspace_here(call, bytes) : wrong;
}

std::string Layer::workspace(const DynamicPluginTensorDesc* in, int32_t inputs,
    const DynamicPluginTensorDesc* out, int32_t outputs, size_t& bytes) const {
    Call call;
    const std::string wrong = examine_largest(attributes_, in, inputs, out, outputs, call);
    if (!wrong.empty()) return wrong;
    if (!builds_ahead()) return workspace_here(call, bytes);
    bytes = 0;
    if (call.batch <= 0 || call.length <= 0) return {};
    return workspace_anywhere(call.geometry, call.batch, call.length, dijiang_architectures(), bytes);
}

std::string Layer::run(const PluginTensorDesc* in, const PluginTensorDesc* out, const void* const* data,
    void* const* results, void* workspace, cudaStream_t stream) const {
    Call call;
    std::string wrong = examine(attributes_, in, inputs_, out, kOutputs, call);
    if (!wrong.empty()) return wrong;
    if (call.batch == 0) return {};
    const auto* past = static_cast<const float*>(data[kPastState]);
    auto* present = static_cast<float*>(results[kPresentState]);
    if (call.length == 0) {  // no tokens: the state stays what it is
        if (past == present) return {};
        const size_t bytes = sizeof(float) * call.batch * attributes_.num_heads * attributes_.head_dim *
                             static_cast<size_t>(attributes_.head_dim);
        return cuda_text(
            cudaMemcpyAsync(present, past, bytes, cudaMemcpyDeviceToDevice, stream), "cannot copy the state");
    }
    const auto numbers = [data](int32_t at) { return static_cast<const float*>(data[at]); };
    dijiang_attention_buffers buffers{};  // strides 0: dense
    buffers.qkv = data[kQkv];
    buffers.gate = data[kGate];
    buffers.past_state = past;
    buffers.positions = static_cast<const int32_t*>(data[kPositions]);
    buffers.seq_lens = static_cast<const int32_t*>(data[kSeqLens]);
    buffers.proj = numbers(kProj);
    buffers.norm_weight = numbers(kNormWeight);
    buffers.norm_bias = numbers(kNormBias);
    buffers.inv_freq = numbers(kInvFreq);
    buffers.log_decay = numbers(kLogDecay);
    if (inputs_ == kInputsWithTables) {
        buffers.gain = numbers(kGain);
        buffers.read_scale = numbers(kReadScale);
    }
    buffers.output = results[kOutput];
    buffers.present_state = present;
    // TensorRT does not say how much workspace it brought: at least what was asked for a call of this size or
    // larger.
    wrong = workspace_here(call, buffers.workspace_size);
    if (!wrong.empty()) return wrong;
    buffers.workspace = buffers.workspace_size == 0 ? nullptr : workspace;
    buffers.sync = sync_.data();
    buffers.sync_size = sync_.size();
    return status_text(dijiang_attention(&call.geometry, call.batch, call.length, &buffers, stream));
}

}  // namespace dijiang::trt::attention
