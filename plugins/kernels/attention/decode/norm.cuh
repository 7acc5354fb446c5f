// Pieces of the op that both decode kernels share: one GroupNorm group, the last to arrive.
#pragma once

#include "attention/terms.cuh"
#include "device/elements.cuh"
#include "device/math.cuh"

namespace dijiang {
namespace decode {

// One warp normalises one group: get(c) is its channel c in 0..channels-1, put(c, y) takes the value for it.
// The group is divided by the power of two below its largest magnitude if that exceeds one, so that squares
// cannot overflow (docs/mathematics.md, section 5, divides by the magnitude itself; any scale near it will do).
// Most groups have at most 32 channels, one a lane, read once.
template <typename Get, typename Put>
__device__ __forceinline__ void normalise_group(int channels, float inverse_channels, float epsilon, Get get,
                                                Put put) {
    // The sum is taken before the scale is known; 2^-10 keeps it finite, and loses what is far below epsilon.
    constexpr float kShrink = 1.0f / 1024.0f;
    const int lane = threadIdx.x % 32;
    const float first = lane < channels ? get(lane) : 0.0f;
    float largest = fabsf(first), sum = first * kShrink;
#pragma unroll 1
    for (int c = lane + 32; c < channels; c += 32) {
        const float x = get(c);
        largest = fmaxf(largest, fabsf(x));
        sum += x * kShrink;
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, offset));
        sum += __shfl_xor_sync(~0u, sum, offset);
    }
    // 2^-e for a magnitude of 2^e and more, e in 0..126.
    const uint32_t exponent = min(__float_as_uint(fmaxf(largest, 1.0f)) >> 23, 253u);
    const float shrink = __uint_as_float((254u - exponent) << 23);
    const float mean = sum * shrink * (inverse_channels / kShrink);
    // Not fused: a group of one channel is exactly zero.
    const float centred = __fmul_rn(first, shrink) - mean;
    float squares = lane < channels ? centred * centred : 0.0f;
#pragma unroll 1
    for (int c = lane + 32; c < channels; c += 32) {
        const float x = __fmul_rn(get(c), shrink) - mean;
        squares += x * x;
    }
    squares = warp_sum(squares);
    const float least = fmaxf(epsilon * shrink * shrink, kLeastEpsilon);
    const float inverse = rsqrtf(squares * inverse_channels + least);
    if (lane < channels) put(lane, centred * inverse);
#pragma unroll 1
    for (int c = lane + 32; c < channels; c += 32) put(c, (__fmul_rn(get(c), shrink) - mean) * inverse);
}

// Every block of a head set has written its part of the raw outputs to global memory and calls this; true in
// the last one, which may then read the others' parts. The counter is left at zero. All threads call.
__device__ __forceinline__ bool arrives_last(uint32_t* counter, uint32_t arrivals) {
    __shared__ uint32_t last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicInc(counter, arrivals - 1) == arrivals - 1;
    __syncthreads();
    if (last) __threadfence();
    return last;
}

// One block normalises and gates a whole head set of one row from the raw outputs in the workspace.
template <typename T>
__device__ __forceinline__ void finish_set(const AttentionParams& p, int row, int set, int set_channels) {
    const int64_t start = static_cast<int64_t>(set) * set_channels;
    const float* raw = static_cast<const float*>(p.workspace) +
                       static_cast<int64_t>(row) * p.num_heads * p.head_dim + start;
    const T* gate = static_cast<const T*>(p.gate) + row * p.gate_batch_stride + start;
    T* output = static_cast<T*>(p.output) + row * p.output_batch_stride + start;
    const int groups = set_channels / p.num_heads;
    const float inverse_channels = 1.0f / p.num_heads;
    for (int group = threadIdx.x / 32; group < groups; group += blockDim.x / 32) {
        const int base = group * p.num_heads;
        normalise_group(
            p.num_heads, inverse_channels, p.epsilon, [&](int c) { return __ldcg(raw + base + c); },
            [&](int c, float y) {
                const int x = base + c;
                const float normed = y * p.norm_weight[start + x] + p.norm_bias[start + x];
                output[x] = from_float<T>(normed * silu(to_float(gate[x])));
            });
    }
}

}  // namespace decode
}  // namespace dijiang
