// GroupNorm and gate on the accumulators of the fused kernel's consumer warps.
#pragma once

#include "attention/prefill/fused_shape.cuh"

namespace dijiang::prefill {

// A warp's columns of o for kReadTiles * 16 tokens.
template <int D> using ReadOut = float[Shape<D>::kReadTiles][Shape<D>::kColumns / 8][4];

// What a block does not normalise itself goes out in float32. `first`: of the chunk's tokens.
template <int D>
__device__ __forceinline__ void store_raw(const AttentionParams& p, const Cut& cut, const Place& at,
                                          const ReadOut<D>& out, const float* read,
                                          float unit, int head, int column, int chunk, int first) {
    const int lane = fresh_lane(), width = p.num_heads * p.head_dim;
    float* rows = cut.raw + (static_cast<int64_t>(at.row) * p.length + chunk * kChunk) * width + head * p.head_dim
                  + column + 2 * (lane % 4);
#pragma unroll
    for (int r = 0; r < Shape<D>::kReadTiles; ++r)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int t = first + 16 * r + lane / 4 + 8 * h;
            if (chunk * kChunk + t >= at.length) continue;
            const float scale = read[t] * unit;
#pragma unroll
            for (int n = 0; n < Shape<D>::kColumns / 8; ++n)
                if (column + 8 * n < p.head_dim)
                    *reinterpret_cast<float2*>(rows + static_cast<int64_t>(t) * width + 8 * n) =
                        make_float2(out[r][n][2 * h] * scale, out[r][n][2 * h + 1] * scale);
        }
}

// The warp's finished columns, from shared memory: 16 bytes a lane.
template <typename T, int D>
__device__ __forceinline__ void store_rows(const AttentionParams& p, const Place& at, const T* tile, int head,
                                           int column, int chunk) {
    constexpr int kVectors = Shape<D>::kColumns / 8;
    T* rows = static_cast<T*>(p.output) + at.row * p.output_batch_stride + head * p.head_dim + column;
    const int lane = fresh_lane(), v = lane % kVectors * 8;
    if (column + v >= p.head_dim) return;
    T* to = rows + (chunk * kChunk + lane / kVectors) * p.output_token_stride + v;
    const int count = min(kChunk, at.length - chunk * kChunk);
#pragma unroll 2
    for (int t = lane / kVectors; t < count; t += 32 / kVectors, to += 32 / kVectors * p.output_token_stride)
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(tile + t * Shape<D>::kValuePitch + v);
}

// Heads of one group that are read at different scales: each token's relative to the largest of its set.
template <int R, int V> __device__ __forceinline__ void scale_rows(float (&out)[R][V][4], const float* read) {
#pragma unroll
    for (int i = 0; i < 2 * R; ++i) {
        const float scale = read[fresh_lane() / 4 + 8 * i];
#pragma unroll
        for (int n = 0; n < V; ++n) out[i / 2][n][i % 2 * 2] *= scale, out[i / 2][n][i % 2 * 2 + 1] *= scale;
    }
}

// Of kRows of the rows that a lane holds a part of: mean and sum of squares about it. All rows take each step
// together, because a step is short and its latency is not. Nothing here overflows below 1e18.
template <int kRows> struct Moments {
    float mean[kRows], squares[kRows];
};

template <int kTiles, int kRows, int R, int V>
__device__ __forceinline__ void measure(const float (&out)[R][V][4], int unit, int first, Moments<kRows>& m) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        const int r = (first + i) / 2, h = (first + i) % 2 * 2;
        m.mean[i] = 0.0f;
#pragma unroll
        for (int n = unit * kTiles; n < (unit + 1) * kTiles; ++n) m.mean[i] += out[r][n][h] + out[r][n][h + 1];
    }
#pragma unroll
    for (int s = 1; s <= 2; s *= 2)
#pragma unroll
        for (int i = 0; i < kRows; ++i) m.mean[i] += __shfl_xor_sync(~0u, m.mean[i], s);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        const int r = (first + i) / 2, h = (first + i) % 2 * 2;
        m.mean[i] *= 1.0f / (8 * kTiles);
        m.squares[i] = 0.0f;
#pragma unroll
        for (int n = unit * kTiles; n < (unit + 1) * kTiles; ++n) {
            const float a = out[r][n][h] - m.mean[i], b = out[r][n][h + 1] - m.mean[i];
            m.squares[i] = fmaf(a, a, fmaf(b, b, m.squares[i]));
        }
    }
#pragma unroll
    for (int s = 1; s <= 2; s *= 2)
#pragma unroll
        for (int i = 0; i < kRows; ++i) m.squares[i] += __shfl_xor_sync(~0u, m.squares[i], s);
}

// Groups of H channels are made of units of 8 kTiles columns. Where a group has several, their moments meet in shared
// memory and are combined as for samples of equal size.
template <typename T, int D, int kTiles>
__device__ __forceinline__ void
normalise_units(const AttentionParams& p, const Cut& cut, const Place& at, char* shared, T* gates,
                const ReadOut<D>& out, const float* epsilon, int unit, int local, int parity, int token) {
    using S = Shape<D>;
    constexpr int kUnits = S::kColumns / 8 / kTiles, kWidth = 8 * kTiles;
    constexpr int kRows = S::kNormRows;
    const int lane = fresh_lane(), g = lane / 4, c = 2 * (lane % 4), d = p.head_dim, heads = p.num_heads;
    const int in_set = unit * d + local;
    const bool several = heads > kWidth;
    const int stride = cut.set * (S::kOwn / S::kNarrowest) * kChunk;  // one array of a parity
    float* stats = reinterpret_cast<float*>(shared + S::kProj + cut.set * cut.head_memory) + parity * 2 * stride + token + g;
    if (local >= d) return;
    if (several) {
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
#pragma unroll
            for (int row = 0; row < 2 * S::kReadTiles; row += kRows) {
                Moments<kRows> m;
                measure<kTiles>(out, u, row, m);
                if (lane % 4 == 0) {
#pragma unroll
                    for (int i = 0; i < kRows; ++i) {
                        float* to = stats + (in_set / kWidth + u) * kChunk + 8 * (row + i);
                        to[0] = m.mean[i], to[stride] = m.squares[i];
                    }
                }
            }
        }
        barrier_sync(kNormed, 32 * cut.set * (min(d, S::kOwn) / S::kColumns));
    }
    const float share = reciprocal(static_cast<float>(heads));
    const int channel = at.first_head * d + at.first_column + in_set + c;
    gates += (token + g) * S::kValuePitch + c;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
#pragma unroll
        for (int row = 0; row < 2 * S::kReadTiles; row += kRows) {
            Moments<kRows> m;
            if (several) {
                const int per_group = heads / kWidth;
                const float* from = stats + (in_set / kWidth + u) / per_group * per_group * kChunk + 8 * row;
#pragma unroll
                for (int i = 0; i < kRows; ++i)
                    m.mean[i] = from[8 * i], m.squares[i] = from[stride + 8 * i];
#pragma unroll 1
                for (int j = 1; j < per_group; ++j) {  // j units so far, and one more
                    from += kChunk;
                    const float fraction = reciprocal(j + 1.0f), weight = kWidth * j * fraction;
#pragma unroll
                    for (int i = 0; i < kRows; ++i) {
                        const float gap = from[8 * i] - m.mean[i];
                        m.mean[i] = fmaf(gap, fraction, m.mean[i]);
                        m.squares[i] += fmaf(gap * gap, weight, from[stride + 8 * i]);
                    }
                }
            } else {
                measure<kTiles>(out, u, row, m);
            }
            float first[kRows], second[kRows];  // x -> x * first + second normalises
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
                const float floor = epsilon[token + g + 8 * (row + i)];
                first[i] = copysignf(fast_rsqrt(fmaf(m.squares[i], share, fabsf(floor))), floor);
                second[i] = -m.mean[i] * first[i];
            }
#pragma unroll
            for (int n = u * kTiles; n < (u + 1) * kTiles; ++n) {
                const float2 w = *reinterpret_cast<const float2*>(p.norm_weight + channel + 8 * n);
                const float2 b = *reinterpret_cast<const float2*>(p.norm_bias + channel + 8 * n);
                uint32_t* gate = reinterpret_cast<uint32_t*>(gates + 8 * row * S::kValuePitch + 8 * n);
                constexpr int kStep = 8 * S::kValuePitch / 2;  // of eight rows
                float2 z[kRows];
#pragma unroll
                for (int i = 0; i < kRows; ++i) z[i] = unpack<T>(gate[i * kStep]);
#pragma unroll
                for (int i = 0; i < kRows; ++i) {
                    const float x = fmaf(out[(row + i) / 2][n][(row + i) % 2 * 2], first[i], second[i]);
                    const float y = fmaf(out[(row + i) / 2][n][(row + i) % 2 * 2 + 1], first[i], second[i]);
                    gate[i * kStep] = pack<T>(fmaf(x, w.x, b.x) * fast_silu(z[i].x), fmaf(y, w.y, b.y) * fast_silu(z[i].y));
                }
            }
        }
    }
}

// H is a multiple of kNarrowest. `token`: the first of `out`, of the chunk's.
template <typename T, int D>
__device__ __forceinline__ void
normalise(const AttentionParams& p, const Cut& cut, const Place& at, char* shared, T* gates,
          const ReadOut<D>& out, const float* epsilon, int unit, int local, int parity, int token) {
    constexpr int kTiles = Shape<D>::kColumns / 8, kFewest = Shape<D>::kNarrowest / 8;
    if (kTiles == kFewest || p.num_heads % (8 * kTiles) == 0)
        normalise_units<T, D, kTiles>(p, cut, at, shared, gates, out, epsilon, unit, local, parity, token);
    else
        normalise_units<T, D, kFewest>(p, cut, at, shared, gates, out, epsilon, unit, local, parity, token);
}

}  // namespace dijiang::prefill
