// The kernels around cuBLASLt's products of many rows. All are bound by memory.
#pragma once

#include "device/activation.cuh"
#include "device/elements.cuh"
#include "device/math.cuh"
#include "device/overlap.cuh"
#include "linear/input.cuh"
#include "linear/many/parts.h"
#include "linear/quantized/weights.cuh"

namespace dijiang {
namespace many {

// Eight neighbouring elements of a block of 32, from 8 c on, of output element g: pair c of each of the four lanes
// (g, 0) to (g, 3) of weights.cuh. Rounded to T once.
template <typename T> __device__ __forceinline__ uint4 scaled(const float2 (&pairs)[4], float scale) {
    return {pack<T>(pairs[0].x * scale, pairs[0].y * scale), pack<T>(pairs[1].x * scale, pairs[1].y * scale),
            pack<T>(pairs[2].x * scale, pairs[2].y * scale), pack<T>(pairs[3].x * scale, pairs[3].y * scale)};
}

// A pair of integers, less 1024 and more: below a float16's significand, with the exponent that makes its last bit 1.
__device__ __forceinline__ float2 integers(uint32_t pair, float more) {
    const float2 both = unpack<__half>(pair | 0x64006400u);
    return {both.x - more, both.y - more};
}

template <typename T> __device__ __forceinline__ uint4 widened_int4(uint32_t word, float scale) {
    const int lane = threadIdx.x % 32, c = lane % 4;
    float2 pairs[4];
#pragma unroll
    for (int of = 0; of < 4; ++of) {
        const uint32_t theirs = __shfl_sync(~0u, word, lane - c + of);
        pairs[of] = integers(theirs >> (4 * c) & 0x000f000fu, 1024.0f + 8.0f);
    }
    return scaled<T>(pairs, scale);
}

template <typename T> __device__ __forceinline__ uint4 widened_int8(uint32_t low, uint32_t high, float scale) {
    const int lane = threadIdx.x % 32, c = lane % 4;
    float2 pairs[4];
#pragma unroll
    for (int of = 0; of < 4; ++of) {
        const uint32_t first = __shfl_sync(~0u, low, lane - c + of), second = __shfl_sync(~0u, high, lane - c + of);
        const uint32_t two = (c < 2 ? first : second) >> (16 * (c % 2));
        pairs[of] = integers((two & 0xffu) | (two & 0xff00u) << 8, 1024.0f + 128.0f);
    }
    return scaled<T>(pairs, scale);
}

// A warp widens a chunk of a tile: 8 output elements by 64 or 128 elements of K.
template <typename T, int kFormat> __device__ __forceinline__ void widen_chunk(const WidenJob& job, int index) {
    constexpr int kBlocks = kFormat == DIJIANG_INT4 ? 4 : 2;
    const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
    const int tile = index / job.chunks, chunk = index - tile * job.chunks, row = 8 * tile + g;
    const unsigned char* const from = job.from + int64_t{index} * quantized::chunk_bytes(kFormat);
    const uint4 weights = __ldg(reinterpret_cast<const uint4*>(from + 16 * lane));
    uint32_t scales[4];
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
        scales[b] = __ldg(reinterpret_cast<const uint32_t*>(from + quantized::kLoad + 4 * kBlocks * (g / 2)) + b);
    const int first = chunk * quantized::chunk_elements(kFormat);
    T* const to = static_cast<T*>(job.to) + int64_t{row} * job.inner + first + 8 * c;
    const uint32_t words[4] = {weights.x, weights.y, weights.z, weights.w};
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
        const float2 both = unpack<__half>(scales[b]);
        const float scale = g % 2 == 0 ? both.x : both.y;
        uint4 eight;
        if constexpr (kFormat == DIJIANG_INT4) eight = widened_int4<T>(words[b], scale);
        else eight = widened_int8<T>(words[2 * b], words[2 * b + 1], scale);
        if (row < job.rows && first + 32 * b < job.inner) *reinterpret_cast<uint4*>(to + 32 * b) = eight;
    }
}

template <typename T> __device__ __forceinline__ void round_bias(const Widen& p, int block) {
    int j = p.bias_count - 1;
    while (j > 0 && block < p.biases[j].first_block) --j;
    const BiasJob& job = p.biases[j];
    const int column = (block - job.first_block) * kThreads + static_cast<int>(threadIdx.x);
    if (column < job.width) static_cast<T*>(job.to)[column] = from_float<T>(__ldg(job.from + column));
}

template <typename T> __global__ void __launch_bounds__(kThreads) widen_kernel(const __grid_constant__ Widen p) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    if (static_cast<int>(blockIdx.x) >= p.blocks) {
        round_bias<T>(p, static_cast<int>(blockIdx.x) - p.blocks);
        return;
    }
    int j = p.count - 1;
    while (j > 0 && static_cast<int>(blockIdx.x) < p.jobs[j].first_block) --j;
    const WidenJob& job = p.jobs[j];
    const int index = (static_cast<int>(blockIdx.x) - job.first_block) * kWarps + threadIdx.x / 32;
    if (index >= (job.rows + 7) / 8 * job.chunks) return;
    if (job.format == DIJIANG_INT4) widen_chunk<T, DIJIANG_INT4>(job, index);
    else widen_chunk<T, DIJIANG_INT8>(job, index);
}

// A warp has a row, whose sums it makes as `linear::normalize` does.
template <typename T> __global__ void __launch_bounds__(kThreads) normalise_kernel(const __grid_constant__ Normalise p) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    const int row = static_cast<int>(blockIdx.x) * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= p.rows) return;
    const T* const x = static_cast<const T*>(p.from) + int64_t{row} * p.inner;
    T* const y = static_cast<T*>(p.to) + int64_t{row} * p.inner;
    const float2 moment = linear::moments_of(p.output, x, p.inner);
    for (int column = 8 * lane; column < p.inner; column += 256) {
        linear::Affine affine;
        affine.load(p.output, p.inner, column);
        float eight[8];
        linear::unpack_eight<T>(*reinterpret_cast<const uint4*>(x + column), eight);
#pragma unroll
        for (int i = 0; i < 8; ++i)
            eight[i] = fmaf((eight[i] - moment.x) * moment.y, affine.weight[i], affine.bias[i]);
        *reinterpret_cast<uint4*>(y + column) = linear::pack_eight<T>(eight);
    }
}

struct Eight {
    float x[8];

    __device__ __forceinline__ void load(const float* from) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float4 four = *reinterpret_cast<const float4*>(from + 4 * i);
            x[4 * i] = four.x, x[4 * i + 1] = four.y, x[4 * i + 2] = four.z, x[4 * i + 3] = four.w;
        }
    }
    __device__ __forceinline__ void load(const float* from, int count) {
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] = from != nullptr && i < count ? __ldg(from + i) : 0.0f;
    }
};

// A thread has eight columns of every eighth row of its block's.
template <typename T, int kActivation>
__global__ void __launch_bounds__(kThreads) finish_kernel(const __grid_constant__ Finish p) {
    constexpr bool kGated = kActivation == DIJIANG_SWIGLU;
    let_next_kernel_start();
    const int column = static_cast<int>(blockIdx.x) * kFinishColumns + 8 * (threadIdx.x % 32);
    const int count = min(p.columns - column, 8);
    Eight bias, second_bias;
    if (count > 0) {
        bias.load(p.bias == nullptr ? nullptr : p.bias + column, count);
        second_bias.load(p.second_bias == nullptr ? nullptr : p.second_bias + column, count);
    }
    wait_for_previous_kernel();
    if (count <= 0) return;
    const int64_t stride = p.stride;
    const bool aligned = p.width % 8 == 0;
    const int first = static_cast<int>(blockIdx.y) * kFinishRows + threadIdx.x / 32;
#pragma unroll
    for (int step = 0; step < kFinishRows / 8; ++step) {
        const int row = first + 8 * step;
        if (row >= p.rows) return;
        Eight sums, others;
        sums.load(p.sums + row * stride + column);
        if (kGated) others.load(p.second + row * stride + column);
        float rest[8];
        const int64_t place = int64_t{row} * p.width + column;
        const T* const added = static_cast<const T*>(p.residual);
        if (added != nullptr && aligned) linear::unpack_eight<T>(*reinterpret_cast<const uint4*>(added + place), rest);
        else
#pragma unroll
            for (int i = 0; i < 8; ++i) rest[i] = added != nullptr && i < count ? to_float(added[place + i]) : 0.0f;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float one = bias.x[i] + (kGated ? 0.0f : second_bias.x[i]) + sums.x[i];
            const float two = kGated ? second_bias.x[i] + others.x[i] : 0.0f;
            rest[i] += activate(kActivation, one, two);
        }
        T* const to = static_cast<T*>(p.to) + place;
        if (aligned) *reinterpret_cast<uint4*>(to) = linear::pack_eight<T>(rest);
        else
#pragma unroll
            for (int i = 0; i < 8; ++i)
                if (i < count) to[i] = from_float<T>(rest[i]);
    }
}

template <typename T> auto finish_of(int32_t activation) -> void (*)(Finish) {
    switch (activation) {
        case DIJIANG_RELU: return finish_kernel<T, DIJIANG_RELU>;
        case DIJIANG_GELU: return finish_kernel<T, DIJIANG_GELU>;
        case DIJIANG_GELU_TANH: return finish_kernel<T, DIJIANG_GELU_TANH>;
        case DIJIANG_SILU: return finish_kernel<T, DIJIANG_SILU>;
        case DIJIANG_SWIGLU: return finish_kernel<T, DIJIANG_SWIGLU>;
        default: return finish_kernel<T, DIJIANG_IDENTITY>;
    }
}

inline dim3 grid_of(const Widen& it) { return dim3(static_cast<unsigned>(it.blocks + it.bias_blocks)); }
inline dim3 grid_of(const Normalise& it) { return dim3(static_cast<unsigned>((it.rows + kWarps - 1) / kWarps)); }
inline dim3 grid_of(const Finish& it) {
    return dim3(static_cast<unsigned>((it.columns + kFinishColumns - 1) / kFinishColumns),
                static_cast<unsigned>((it.rows + kFinishRows - 1) / kFinishRows));
}

}  // namespace many
}  // namespace dijiang
