// The rows that a block multiplies: brought into shared memory, and normalised there.
#pragma once

#include "device/elements.cuh"
#include "device/math.cuh"
#include "linear/linear.h"

namespace dijiang {
namespace linear {

// Eight elements as float32 and back.
template <typename T> __device__ __forceinline__ void unpack_eight(const uint4& v, float (&x)[8]) {
    const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 both = unpack<T>(pairs[i]);
        x[2 * i] = both.x;
        x[2 * i + 1] = both.y;
    }
}
template <typename T> __device__ __forceinline__ uint4 pack_eight(const float (&x)[8]) {
    return {pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]), pack<T>(x[6], x[7])};
}

// What a norm scales and adds at eight elements: constants, which are requested before anything else is, since
// later they would queue behind the weights.
struct Affine {
    float weight[8], bias[8];

    __device__ void load(const dijiang_linear_output& out, int inner, int column) {
        if (out.norm == DIJIANG_NORM_NONE || column >= inner) return;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float4 w = __ldg(reinterpret_cast<const float4*>(out.norm_weight + column) + i);
            weight[4 * i] = w.x, weight[4 * i + 1] = w.y, weight[4 * i + 2] = w.z, weight[4 * i + 3] = w.w;
            float4 b = {0.0f, 0.0f, 0.0f, 0.0f};
            if (out.norm_bias != nullptr) b = __ldg(reinterpret_cast<const float4*>(out.norm_bias + column) + i);
            bias[4 * i] = b.x, bias[4 * i + 1] = b.y, bias[4 * i + 2] = b.z, bias[4 * i + 3] = b.w;
        }
    }
};

// The inputs of this block's rows, side by side if there are two.
template <typename T>
__device__ void stage(const dijiang_linear_term* terms, int count, int first_row, int rows, int pitch, T* to) {
    for (int t = 0; t < count; ++t) {
        const int inner = terms[t].inner;
        const T* from = static_cast<const T*>(terms[t].input) + int64_t{first_row} * inner;
        for (int row = 0; row < rows; ++row, from += inner)
#pragma unroll 2
            for (int x = 8 * threadIdx.x; x < inner; x += 8 * blockDim.x)
                *reinterpret_cast<uint4*>(to + row * pitch + x) = __ldcg(reinterpret_cast<const uint4*>(from + x));
        to += inner;
    }
}

// A row's mean, or 0 for RMSNorm, and one over its deviation, by all lanes of a warp.
template <typename T> __device__ __forceinline__ float2 moments_of(const dijiang_linear_output& out, const T* x, int inner) {
    const int lane = threadIdx.x % 32;
    float mean = 0.0f, squares = 0.0f;
    if (out.norm == DIJIANG_LAYER_NORM) {
        float sum = 0.0f;
        for (int column = 8 * lane; column < inner; column += 256) {
            float eight[8];
            unpack_eight<T>(*reinterpret_cast<const uint4*>(x + column), eight);
#pragma unroll
            for (int i = 0; i < 8; ++i) sum += eight[i];
        }
        mean = warp_sum(sum) / static_cast<float>(inner);
    }
    for (int column = 8 * lane; column < inner; column += 256) {
        float eight[8];
        unpack_eight<T>(*reinterpret_cast<const uint4*>(x + column), eight);
#pragma unroll
        for (int i = 0; i < 8; ++i) squares = fmaf(eight[i] - mean, eight[i] - mean, squares);
    }
    squares = warp_sum(squares) / static_cast<float>(inner);
    return {mean, rsqrtf(squares + out.epsilon)};
}

// LayerNorm or RMSNorm of the staged rows, in place. All threads of the block call it after a barrier, and
// one must follow. A warp knows the sums of a row; a thread scales some columns of all rows, first those that
// it has `affine` of.
template <typename T>
__device__ void normalize(const dijiang_linear_output& out, int inner, int rows, int pitch, Affine& affine,
                          T* staged, float2* moments) {
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int row = warp; row < rows; row += warps) {
        const float2 moment = moments_of(out, staged + row * pitch, inner);
        if (lane == 0) moments[row] = moment;
    }
    __syncthreads();
    for (int column = 8 * threadIdx.x; column < inner; column += 8 * blockDim.x) {
        for (int row = 0; row < rows; ++row) {
            uint4* const place = reinterpret_cast<uint4*>(staged + row * pitch + column);
            const float2 moment = moments[row];
            float eight[8];
            unpack_eight<T>(*place, eight);
#pragma unroll
            for (int i = 0; i < 8; ++i)
                eight[i] = fmaf((eight[i] - moment.x) * moment.y, affine.weight[i], affine.bias[i]);
            *place = pack_eight<T>(eight);
        }
        affine.load(out, inner, column + 8 * blockDim.x);
    }
}

}  // namespace linear
}  // namespace dijiang
