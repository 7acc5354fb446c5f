// The features of q and k of all rows and heads: RoPE, u P on tensor cores, softmax.
//
// u is float32. It is multiplied as a sum of three numbers of T, which have all its bits; P's are T's anyway. A block has
// some vectors, and a warp some columns of P for all of them.
#pragma once

#include "attention/attention.h"
#include "attention/decode/batch/batch.h"
#include "attention/rotary.cuh"
#include "device/copies.cuh"
#include "device/elements.cuh"
#include "device/math.cuh"
#include "device/mma.cuh"
#include "device/overlap.cuh"

namespace dijiang {
namespace decode {

template <int D_, int Warps> struct FeatureShape {
    static constexpr int D = D_, kWarps = Warps, kThreads = 32 * Warps;
    static constexpr int kTiles = 2, kVectors = 16 * kTiles;  // of a block
    static constexpr int kColumns = D / Warps;                // of a warp
    static constexpr int kPitch = D + 8;                      // elements of a row of P and u: neighbours in different banks
    static constexpr int kTerms = 3;
    static constexpr int kMemory = 2 * kPitch * (D + kTerms * kVectors) + 8 * Warps * kVectors;  // bytes
    static_assert(D % 16 == 0 && kColumns % 16 == 0, "a warp has whole pairs of tiles");
};

// float16 has no room for what RoPE makes of its largest numbers.
template <typename T> constexpr float kTurnedScale = 1.0f;
template <> constexpr float kTurnedScale<__half> = 0.25f;

// The block's vectors, turned, as three terms in rows of shared memory.
template <typename T, typename S>
__device__ __forceinline__ void turn_vectors(const AttentionParams& p, const FeatureCut& cut, int first, T* terms) {
    constexpr int D = S::D, kPitch = S::kPitch;
    const int lane = static_cast<int>(threadIdx.x % 32), half = p.rotary_dim / 2;
    for (int v = static_cast<int>(threadIdx.x / 32); v < S::kVectors; v += S::kWarps) {
        const int vector = first + v, row = vector / cut.vectors_per_row;
        const bool there = vector < cut.vectors;
        const T* const from = static_cast<const T*>(p.qkv) + (there ? row * p.qkv_batch_stride : 0) +
                              (there ? (vector - row * cut.vectors_per_row) * D : 0);
        const float position = there ? static_cast<float>(p.positions[row]) : 0.0f;
#pragma unroll
        for (int j = 0; j < (D + 31) / 32; ++j) {
            const int e = lane + 32 * j;
            if (D % 32 != 0 && e >= D) break;
            float u = there ? to_float(from[e]) : 0.0f;
            if (there && e < 2 * half) {
                const bool low = e < half;
                const float inv_freq = __ldg(p.inv_freq + (low ? e : e - half));
                float cosine, sine;
                rotary_cos_sin(rotary_turn(turns_per_token(low ? -inv_freq : inv_freq), position), cosine, sine);
                u = u * cosine + to_float(from[low ? e + half : e - half]) * sine;
            }
            u *= kTurnedScale<T>;
#pragma unroll
            for (int term = 0; term < S::kTerms; ++term) {
                const T rounded = from_float<T>(u);
                terms[(term * S::kVectors + v) * kPitch + e] = rounded;
                u -= to_float(rounded);
            }
        }
    }
}

template <typename T, typename S>
__device__ __forceinline__ void make_features(const AttentionParams& p, const FeatureCut& cut, unsigned char* shared) {
    constexpr int D = S::D, kPitch = S::kPitch, kTiles = S::kTiles, kColumns = S::kColumns;
    T* const proj = reinterpret_cast<T*>(shared);
    T* const terms = proj + D * kPitch;
    float* const found = reinterpret_cast<float*>(terms + S::kTerms * S::kVectors * kPitch);  // [maxima, sums][warp][vector]
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    const int first = static_cast<int>(blockIdx.x) * S::kVectors;
    wait_for_previous_kernel();
    let_next_kernel_start();  // it may read what the ones before this one wrote

#pragma unroll 8
    for (int i = static_cast<int>(threadIdx.x); i < D * D / 4; i += S::kThreads) {
        const float4 four = __ldg(reinterpret_cast<const float4*>(p.proj) + i);
        const int k = i / (D / 4), n = 4 * (i - k * (D / 4));
        *reinterpret_cast<uint2*>(proj + k * kPitch + n) = {pack<T>(four.x, four.y), pack<T>(four.z, four.w)};
    }
    turn_vectors<T, S>(p, cut, first, terms);
    __syncthreads();

    float sums[kTiles][kColumns / 8][4] = {};
    const uint32_t columns = shared_address(proj) + lane_by_row(kPitch) + 2u * warp * kColumns;
    const uint32_t vectors = shared_address(terms) + lane_by_row(kPitch);
#pragma unroll 1
    for (int k = 0; k < D; k += 16) {
        uint32_t b[kColumns / 16][4];
#pragma unroll
        for (int n = 0; n < kColumns / 16; ++n) ldmatrix_trans(b[n], columns + 2u * (k * kPitch + 16 * n));
#pragma unroll
        for (int term = 0; term < S::kTerms; ++term)
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
                uint32_t a[4];
                ldmatrix(a, vectors + 2u * ((term * S::kVectors + 16 * tile) * kPitch + k));
#pragma unroll
                for (int n = 0; n < kColumns / 16; ++n) {
                    mma<T>(sums[tile][2 * n], a, b[n][0], b[n][1]);
                    mma<T>(sums[tile][2 * n + 1], a, b[n][2], b[n][3]);
                }
            }
    }

    // Softmax over the columns of all warps. A lane has columns of vectors g and g + 8 of each tile.
    const int g = lane / 4, c = 2 * (lane % 4);
    const auto meet = [&](float (&of)[kTiles][2], bool maximum) {
        float* const mine = found + (maximum ? 0 : S::kWarps * S::kVectors);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float x = of[tile][h];
#pragma unroll
                for (int offset = 1; offset < 4; offset *= 2) {
                    const float other = __shfl_xor_sync(~0u, x, offset);
                    x = maximum ? fmaxf(x, other) : x + other;
                }
                if (c == 0) mine[warp * S::kVectors + 16 * tile + 8 * h + g] = x;
            }
        __syncthreads();
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float x = maximum ? -INFINITY : 0.0f;
#pragma unroll
                for (int w = 0; w < S::kWarps; ++w) {
                    const float other = mine[w * S::kVectors + 16 * tile + 8 * h + g];
                    x = maximum ? fmaxf(x, other) : x + other;
                }
                of[tile][h] = x;
            }
    };
    float most[kTiles][2], total[kTiles][2] = {};
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            most[tile][h] = -INFINITY;
#pragma unroll
            for (int n = 0; n < kColumns / 8; ++n)
                most[tile][h] = fmaxf(most[tile][h], fmaxf(sums[tile][n][2 * h], sums[tile][n][2 * h + 1]));
        }
    meet(most, true);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float& x = sums[tile][n][i];
                x = fast_exp2((x - most[tile][i / 2]) * (kLog2E / kTurnedScale<T>));
                total[tile][i / 2] += x;
            }
    meet(total, false);
    float* const features = static_cast<float*>(p.workspace);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int vector = first + 16 * tile + 8 * h + g;
            if (vector >= cut.vectors) continue;
            const float scale = __fdividef(1.0f, total[tile][h]);
            float* const to = features + int64_t{vector} * D + warp * kColumns + c;
#pragma unroll
            for (int n = 0; n < kColumns / 8; ++n)
                *reinterpret_cast<float2*>(to + 8 * n) = {sums[tile][n][2 * h] * scale, sums[tile][n][2 * h + 1] * scale};
        }
}

template <typename T, typename S>
__global__ void __launch_bounds__(S::kThreads)
    features_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ FeatureCut cut) {
    extern __shared__ uint4 shared[];
    make_features<T, S>(p, cut, reinterpret_cast<unsigned char*>(shared));
}

}  // namespace decode
}  // namespace dijiang
