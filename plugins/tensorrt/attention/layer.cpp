#include "attention/layer.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>

#include "attention/ahead.h"
#include "common/texts.h"

namespace dijiang::trt {
namespace {

using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;

using Tensors = std::array<Tensor, kInputsWithTables + kOutputs>;

// One list of inputs, then outputs; `view` makes a Tensor of a description. Empty where the counts are wrong.
template <typename Description, typename View>
Tensors list(const Description* in, int32_t inputs, const Description* out, int32_t outputs, View view) {
    Tensors tensors{};
    if (!right_count(inputs, outputs)) return tensors;
    for (int32_t i = 0; i < inputs; ++i) tensors[i] = view(in[i]);
    for (int32_t i = 0; i < outputs; ++i) tensors[inputs + i] = view(out[i]);
    return tensors;
}

std::string cuda_text(cudaError_t error, const char* what) {
    return error == cudaSuccess ? std::string() : std::string(what) + ": " + cudaGetErrorString(error);
}

}  // namespace

std::string examine(const Attributes& attributes, const PluginTensorDesc* in, int32_t inputs,
    const PluginTensorDesc* out, int32_t outputs, Call& call) {
    const Tensors tensors = list(
        in, inputs, out, outputs, [](const PluginTensorDesc& desc) { return Tensor{&desc.dims, desc.type}; });
    return examine(attributes, tensors.data(), inputs, outputs, false, call);
}

std::string examine_largest(const Attributes& attributes, const DynamicPluginTensorDesc* in, int32_t inputs,
    const DynamicPluginTensorDesc* out, int32_t outputs, Call& call) {
    const Tensors tensors = list(in, inputs, out, outputs,
        [](const DynamicPluginTensorDesc& desc) { return Tensor{&desc.desc.dims, desc.desc.type}; });
    const std::string wrong = examine(attributes, tensors.data(), inputs, outputs, true, call);
    if (!wrong.empty()) return wrong;
    const nvinfer1::Dims& largest = in[kQkv].max;
    if (largest.nbDims != 3) return {};
    if (largest.d[0] > INT32_MAX || largest.d[1] > INT32_MAX)
        return "the profile allows 2^31 rows or tokens, or more";
    call.batch = std::max(call.batch, static_cast<int32_t>(largest.d[0]));
    call.length = std::max(call.length, static_cast<int32_t>(largest.d[1]));
    return {};
}

std::string Layer::configure(
    const DynamicPluginTensorDesc* in, int32_t inputs, const DynamicPluginTensorDesc* out, int32_t outputs) {
    Call largest;
    const std::string wrong = examine_largest(attributes_, in, inputs, out, outputs, largest);
    if (wrong.empty()) limits_.include(largest.batch, largest.length);
    return wrong;
}

std::string Layer::prepare(
    const PluginTensorDesc* in, int32_t inputs, const PluginTensorDesc* out, int32_t outputs) {
    Call call;
    const std::string wrong = examine(attributes_, in, inputs, out, outputs, call);
    if (!wrong.empty()) return wrong;
    limits_.include(call.batch, call.length);
    return reserve(call.geometry);
}

std::string Layer::reserve(const dijiang_geometry& geometry) {
    if (limits_.max_batch <= 0 || limits_.max_length <= 0) return {};
    size_t bytes = 0;
    const dijiang_status status =
        dijiang_attention_sync_size(&geometry, limits_.max_batch, limits_.max_length, nullptr, &bytes);
    return status == DIJIANG_OK ? sync_.reserve(bytes) : status_text(status);
}

std::string Layer::reserve() {
    for (const dijiang_dtype dtype : {DIJIANG_FLOAT32, DIJIANG_FLOAT16, DIJIANG_BFLOAT16}) {
        std::string wrong = reserve(geometry_of(attributes_, dtype, 0));
        if (!wrong.empty()) return wrong;
    }
    return {};
}

std::string Layer::workspace(const Call& call, size_t& bytes) {
    bytes = 0;
    if (call.batch <= 0 || call.length <= 0) return {};
    return status_text(
        dijiang_attention_workspace_size(&call.geometry, call.batch, call.length, nullptr, &bytes));
}

std::string Layer::workspace_of_plan(const Call& call, size_t& bytes) {
    if (!builds_ahead()) return workspace(call, bytes);
    bytes = 0;
    if (call.batch <= 0 || call.length <= 0) return {};
    return workspace_anywhere(call.geometry, call.batch, call.length, dijiang_architectures(), bytes);
}

std::string Layer::run(const PluginTensorDesc* in, const PluginTensorDesc* out, int32_t inputs,
    const void* const* data, void* const* results, void* workspace, cudaStream_t stream) const {
    Call call;
    std::string wrong = examine(attributes_, in, inputs, out, kOutputs, call);
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
    if (inputs == kInputsWithTables) {
        buffers.gain = numbers(kGain);
        buffers.read_scale = numbers(kReadScale);
    }
    buffers.output = results[kOutput];
    buffers.present_state = present;
    // TensorRT does not say how much workspace it brought: at least what was asked for a call of this size or
    // larger.
    wrong = Layer::workspace(call, buffers.workspace_size);
    if (!wrong.empty()) return wrong;
    buffers.workspace = buffers.workspace_size == 0 ? nullptr : workspace;
    buffers.sync = sync_.data();
    buffers.sync_size = sync_.size();
    return status_text(dijiang_attention(&call.geometry, call.batch, call.length, &buffers, stream));
}

}  // namespace dijiang::trt
