// The features of q and k of all rows and heads: RoPE, u P on tensor cores, softmax.
//
// u is float32. It is multiplied as a sum of three numbers of T, which have all its bits; P's are T's anyway. A block
// has some vectors and some columns of P, a warp 16 of each. All that a block needs from memory it asks for at once.
// Where a block has but some of the columns, its exponentials are relative to its own maximum, and whoever reads them
// makes up for that with its maximum and sum.
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

template <int D_, int Columns> struct FeatureShape {
    static constexpr int D = D_, kColumns = Columns;                // of P, of a block
    static constexpr int kSlices = D / Columns;                     // blocks that share a vector
    static constexpr int kTiles = 2, kVectors = 16 * kTiles;        // of a block
    static constexpr int kAcross = Columns / 16;                    // warps that share a tile of vectors
    static constexpr int kThreads = 32 * kTiles * kAcross, kWarps = kThreads / 32;
    static constexpr int kPitch = D + 8, kProjPitch = Columns + 8;  // elements of a row: neighbours in different banks
    static constexpr int kTerms = 3;
    static constexpr int kProj = D * Columns / 4 / kThreads;        // float4 of P of a thread
    static constexpr int kRaw = kVectors * D / 8 / kThreads;        // uint4 of q and k
    static constexpr int kTurned = (D + 31) / 32;                   // elements of a vector of a lane
    // Bytes: P, the vectors' terms, the vectors as they came, maxima and sums, positions.
    static constexpr int kMemory =
        2 * kProjPitch * D + 2 * kPitch * kVectors * (kTerms + 1) + 8 * kAcross * kVectors + 4 * kVectors;
    static_assert(D % 16 == 0 && Columns % 16 == 0 && D % Columns == 0, "whole tiles");
    static_assert(kProj * 4 * kThreads == D * Columns && kRaw * 8 * kThreads == kVectors * D, "whole loads");
};

// float16 has no room for what RoPE makes of its largest numbers.
template <typename T> constexpr float kTurnedScale = 1.0f;
template <> constexpr float kTurnedScale<__half> = 0.25f;

// What a lane needs of RoPE for its elements of any vector: element lane + 32 j.
template <typename S> struct FeatureTurns {
    Turns turns[S::kTurned];

    __device__ __forceinline__ void load(const AttentionParams& p, int lane) {
        const int half = p.rotary_dim / 2;
#pragma unroll
        for (int j = 0; j < S::kTurned; ++j) {
            const int e = lane + 32 * j;
            turns[j] = {0.0f, 0.0f};
            if (e < 2 * half) {
                const float inv_freq = __ldg(p.inv_freq + (e < half ? e : e - half));
                turns[j] = turns_per_token(e < half ? -inv_freq : inv_freq);  // the first half subtracts the sine
            }
        }
    }
};

// A warp's vectors, turned, as three terms.
template <typename T, typename S>
__device__ __forceinline__ void turn_vectors(const FeatureTurns<S>& of, int half, const T* raw, const int* positions,
                                             T* terms) {
    const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll 1
    for (int v = static_cast<int>(threadIdx.x / 32); v < S::kVectors; v += S::kWarps) {
        const float position = static_cast<float>(positions[v]);
        const T* const from = raw + v * S::kPitch;
#pragma unroll
        for (int j = 0; j < S::kTurned; ++j) {
            const int e = lane + 32 * j;
            if (S::D % 32 != 0 && e >= S::D) break;
            float u = to_float(from[e]);
            if (e < 2 * half) {
                float cosine, sine;
                rotary_cos_sin(rotary_turn(of.turns[j], position), cosine, sine);
                u = u * cosine + to_float(from[e < half ? e + half : e - half]) * sine;
            }
            u *= kTurnedScale<T>;
#pragma unroll
            for (int term = 0; term < S::kTerms; ++term) {
                const T rounded = from_float<T>(u);
                terms[(term * S::kVectors + v) * S::kPitch + e] = rounded;
                u -= to_float(rounded);
            }
        }
    }
}

template <typename T, typename S>
__device__ __forceinline__ void make_features(const AttentionParams& p, const FeatureCut& cut, unsigned char* shared) {
    constexpr int D = S::D, kPitch = S::kPitch, kProjPitch = S::kProjPitch;
    T* const proj = reinterpret_cast<T*>(shared);
    T* const terms = proj + D * kProjPitch;
    T* const raw = terms + S::kTerms * S::kVectors * kPitch;
    float* const found = reinterpret_cast<float*>(raw + S::kVectors * kPitch);  // [maxima, sums][warp][vector]
    int* const positions = reinterpret_cast<int*>(found + 2 * S::kAcross * S::kVectors);
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
    const int block = static_cast<int>(blockIdx.x), slice = S::kSlices == 1 ? 0 : block % S::kSlices;
    const int first = block / S::kSlices * S::kVectors;
    wait_for_previous_kernel();
    let_next_kernel_start();  // it may read what the ones before this one wrote

    float4 four[S::kProj];
#pragma unroll
    for (int i = 0; i < S::kProj; ++i) {
        const int at = thread + i * S::kThreads, k = at / (S::kColumns / 4), n = at - k * (S::kColumns / 4);
        four[i] = __ldg(reinterpret_cast<const float4*>(p.proj + k * D + slice * S::kColumns) + n);
    }
    uint4 eight[S::kRaw];
#pragma unroll
    for (int i = 0; i < S::kRaw; ++i) {
        const int at = thread + i * S::kThreads, v = at / (D / 8), vector = first + v;
        const int row = vector / cut.vectors_per_row;
        eight[i] = {0, 0, 0, 0};
        if (vector < cut.vectors)
            eight[i] = __ldg(reinterpret_cast<const uint4*>(static_cast<const T*>(p.qkv) + row * p.qkv_batch_stride +
                                                            (vector - row * cut.vectors_per_row) * D) +
                             (at - v * (D / 8)));
    }
    FeatureTurns<S> turns;
    turns.load(p, lane);
    if (thread < S::kVectors)
        positions[thread] = first + thread < cut.vectors ? p.positions[(first + thread) / cut.vectors_per_row] : 0;
#pragma unroll
    for (int i = 0; i < S::kProj; ++i) {
        const int at = thread + i * S::kThreads, k = at / (S::kColumns / 4), n = at - k * (S::kColumns / 4);
        *reinterpret_cast<uint2*>(proj + k * kProjPitch + 4 * n) = {pack<T>(four[i].x, four[i].y),
                                                                    pack<T>(four[i].z, four[i].w)};
    }
#pragma unroll
    for (int i = 0; i < S::kRaw; ++i) {
        const int at = thread + i * S::kThreads, v = at / (D / 8);
        *reinterpret_cast<uint4*>(raw + v * kPitch + 8 * (at - v * (D / 8))) = eight[i];
    }
    __syncthreads();
    turn_vectors<T, S>(turns, p.rotary_dim / 2, raw, positions, terms);
    __syncthreads();

    // 16 columns of 16 vectors.
    const int tile = warp / S::kAcross, across = warp - tile * S::kAcross;
    float sums[2][4] = {};
    const uint32_t columns = shared_address(proj) + lane_by_row(kProjPitch) + 32u * across;
    const uint32_t vectors = shared_address(terms) + lane_by_row(kPitch) + 2u * (16 * tile * kPitch);
#pragma unroll 4
    for (int k = 0; k < D; k += 16) {
        uint32_t b[4];
        ldmatrix_trans(b, columns + 2u * (k * kProjPitch));
#pragma unroll
        for (int term = 0; term < S::kTerms; ++term) {
            uint32_t a[4];
            ldmatrix(a, vectors + 2u * (term * S::kVectors * kPitch + k));
            mma<T>(sums[0], a, b[0], b[1]);
            mma<T>(sums[1], a, b[2], b[3]);
        }
    }

    // Softmax over the columns of the tile's warps. A lane has columns of vectors g and g + 8.
    const int g = lane / 4, c = 2 * (lane % 4);
    const auto meet = [&](float (&of)[2], bool maximum) {
        float* const all = found + (maximum ? 0 : S::kAcross * S::kVectors) + 16 * tile + g;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
            for (int offset = 1; offset < 4; offset *= 2) {
                const float other = __shfl_xor_sync(~0u, of[h], offset);
                of[h] = maximum ? fmaxf(of[h], other) : of[h] + other;
            }
            if (c == 0) all[across * S::kVectors + 8 * h] = of[h];
        }
        __syncthreads();
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            of[h] = maximum ? -INFINITY : 0.0f;
#pragma unroll
            for (int w = 0; w < S::kAcross; ++w) {
                const float other = all[w * S::kVectors + 8 * h];
                of[h] = maximum ? fmaxf(of[h], other) : of[h] + other;
            }
        }
    };
    float most[2], total[2] = {};
#pragma unroll
    for (int h = 0; h < 2; ++h)
        most[h] = fmaxf(fmaxf(sums[0][2 * h], sums[0][2 * h + 1]), fmaxf(sums[1][2 * h], sums[1][2 * h + 1]));
    meet(most, true);
    constexpr float kRate = kLog2E / kTurnedScale<T>;
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            sums[n][i] = fast_exp2((sums[n][i] - most[i / 2]) * kRate);
            total[i / 2] += sums[n][i];
        }
    meet(total, false);
    float* const features = static_cast<float*>(p.workspace);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int vector = first + 16 * tile + 8 * h + g;
        if (vector >= cut.vectors) continue;
        const float scale = S::kSlices == 1 ? __fdividef(1.0f, total[h]) : 1.0f;
        float* const to = features + int64_t{vector} * D + slice * S::kColumns + 16 * across + c;
#pragma unroll
        for (int n = 0; n < 2; ++n)
            *reinterpret_cast<float2*>(to + 8 * n) = {sums[n][2 * h] * scale, sums[n][2 * h + 1] * scale};
        if (S::kSlices > 1 && across == 0 && c == 0)  // behind all features
            reinterpret_cast<float2*>(features + int64_t{cut.vectors} * D)[int64_t{vector} * S::kSlices + slice] = {
                most[h] * kRate, total[h]};
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
