// GroupNorm over raw outputs [B, L, H d] in float32, then the gate: the last kernel where a block of the one before
// does not own every head that a group touches.
#pragma once

#include "attention/prefill/generic.cuh"

namespace dijiang::prefill {


// grid (ceil(L d / groups per block), B); `lanes` (a power of two up to 32) threads share a group.
template <typename T>
__global__ void __launch_bounds__(kGenericThreads) norm_kernel(const AttentionParams p, const float* raw, int lanes) {
    const int d = p.head_dim, heads = p.num_heads, row = blockIdx.y, width = heads * d;
    const int per_block = kGenericThreads / lanes, lane = threadIdx.x % lanes;
    const int64_t group = static_cast<int64_t>(blockIdx.x) * per_block + threadIdx.x / lanes;
    const bool there = group < static_cast<int64_t>(p.length) * d;
    const int token = there ? static_cast<int>(group / d) : 0, channel = there ? static_cast<int>(group % d) * heads : 0;
    const bool valid = there && token < valid_tokens(p, row);
    T* out = static_cast<T*>(p.output) + row * p.output_batch_stride + token * p.output_token_stride + channel;
    const int count = valid ? heads : 0;
    const float* x = raw + (static_cast<int64_t>(row) * p.length + token) * width + channel;

    float top = 1.0f;
    for (int i = lane; i < count; i += lanes) top = fmaxf(top, fabsf(x[i]));
    for (int s = lanes / 2; s; s >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, s));
    const float unit = 1.0f / top;
    float sum = 0.0f;
    // Rounded before the mean is taken off: a fused multiply-add would leave a group of one channel its own rounding
    // error, which a tiny epsilon makes 1.
    for (int i = lane; i < count; i += lanes) sum += __fmul_rn(x[i], unit);
    for (int s = lanes / 2; s; s >>= 1) sum += __shfl_xor_sync(~0u, sum, s);
    const float mean = sum / heads;
    float squares = 0.0f;
    for (int i = lane; i < count; i += lanes) {
        const float centred = __fmul_rn(x[i], unit) - mean;
        squares += centred * centred;
    }
    for (int s = lanes / 2; s; s >>= 1) squares += __shfl_xor_sync(~0u, squares, s);
    const float factor = rsqrtf(squares / heads + fmaxf(p.epsilon * unit * unit, kLeastEpsilon));
    const T* gate = static_cast<const T*>(p.gate) + row * p.gate_batch_stride + token * p.gate_token_stride + channel;
    for (int i = lane; i < count; i += lanes) {
        const float centred = __fmul_rn(x[i], unit) - mean;
        const float normed = centred * factor * p.norm_weight[channel + i] + p.norm_bias[channel + i];
        out[i] = from_float<T>(normed * silu(to_float(gate[i])));
    }
    if (there && !valid)
        for (int i = lane; i < heads; i += lanes) out[i] = from_float<T>(0.0f);
}

inline int norm_lanes(int heads) {
    int lanes = 1;
    while (lanes < 32 && lanes * 2 <= heads) lanes *= 2;
    return lanes;
}

template <typename T> cudaError_t launch_norm(const AttentionParams& p, const float* raw, cudaStream_t stream) {
    const int lanes = norm_lanes(p.num_heads), per_block = kGenericThreads / lanes;
    const int64_t groups = static_cast<int64_t>(p.length) * p.head_dim;
    const dim3 grid(static_cast<unsigned>((groups + per_block - 1) / per_block), p.batch);
    norm_kernel<T><<<grid, kGenericThreads, 0, stream>>>(p, raw, lanes);
    return cudaGetLastError();
}

}  // namespace dijiang::prefill
