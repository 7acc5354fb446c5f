// GroupNorm and gate on the accumulators of the fused kernel's consumer warps.
#pragma once

#include "fused_shape.cuh"

namespace dijiang::prefill {

// What a block does not normalise itself goes out in float32.
template <int D>
__device__ __forceinline__ void store_raw(const AttentionParams& p, const Cut& cut, const Place& at,
                                          const float (&out)[4][Shape<D>::kColumns / 8][4], int head, int column,
                                          int chunk) {
    const int lane = threadIdx.x % 32, width = p.num_heads * p.head_dim;
    float* rows = cut.raw + (static_cast<int64_t>(at.row) * p.length + chunk * kChunk) * width + head * p.head_dim
                  + column + 2 * (lane % 4);
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int t = 16 * r + lane / 4 + 8 * h;
            if (chunk * kChunk + t >= at.length) continue;
#pragma unroll
            for (int n = 0; n < Shape<D>::kColumns / 8; ++n)
                if (column + 8 * n < p.head_dim)
                    *reinterpret_cast<float2*>(rows + static_cast<int64_t>(t) * width + 8 * n) =
                        make_float2(out[r][n][2 * h], out[r][n][2 * h + 1]);
        }
}

// The warp's finished columns, from shared memory: 16 bytes a lane.
template <typename T, int D>
__device__ __forceinline__ void store_rows(const AttentionParams& p, const Place& at, const T* tile, int head,
                                           int column, int chunk) {
    constexpr int kVectors = Shape<D>::kColumns / 8;
    T* rows = static_cast<T*>(p.output) + at.row * p.output_batch_stride + head * p.head_dim + column;
    const int lane = threadIdx.x % 32, v = lane % kVectors * 8;
    if (column + v >= p.head_dim) return;
    T* to = rows + (chunk * kChunk + lane / kVectors) * p.output_token_stride + v;
    const int count = min(kChunk, at.length - chunk * kChunk);
#pragma unroll 2
    for (int t = lane / kVectors; t < count; t += 32 / kVectors, to += 32 / kVectors * p.output_token_stride)
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(tile + t * Shape<D>::kPitch + v);
}

// x -> (x * unit - mean) * factor is the group's normalisation (reference/attention.py, group_norm).
struct Moments {
    float top, mean, squares;  // largest magnitude, at least 1; then of x / top: mean, sum of squares about it
};

__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

template <int kTiles>
__device__ __forceinline__ Moments moments(const float (&x)[kTiles][2]) {
    Moments m = {1.0f, 0.0f, 0.0f};
#pragma unroll
    for (int n = 0; n < kTiles; ++n) m.top = fmaxf(m.top, fmaxf(fabsf(x[n][0]), fabsf(x[n][1])));
    m.top = fmaxf(m.top, __shfl_xor_sync(~0u, m.top, 1));
    m.top = fmaxf(m.top, __shfl_xor_sync(~0u, m.top, 2));
    const float scale = reciprocal(m.top);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) m.mean += x[n][0] * scale + x[n][1] * scale;
    m.mean = quad_sum(m.mean) * (1.0f / (8 * kTiles));
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
        const float a = x[n][0] * scale - m.mean, b = x[n][1] * scale - m.mean;
        m.squares = fmaf(a, a, fmaf(b, b, m.squares));
    }
    m.squares = quad_sum(m.squares);
    return m;
}

// Groups of H channels are made of units of 8 kTiles columns, whose moments meet in shared memory and are combined as
// for samples of equal size.
template <typename T, int D, int kTiles>
__device__ __forceinline__ void
normalise_units(const AttentionParams& p, const Cut& cut, const Place& at, char* shared, T* gates,
                const float (&out)[4][Shape<D>::kColumns / 8][4], int unit, int column, int parity) {
    using S = Shape<D>;
    constexpr int kUnits = S::kColumns / 8 / kTiles, kWidth = 8 * kTiles;
    const int lane = threadIdx.x % 32, g = lane / 4, c = 2 * (lane % 4), d = p.head_dim, heads = p.num_heads;
    const int per_group = heads / kWidth, in_set = unit * d + column;
    constexpr int kStride = S::kMostHeads * D / 16 * kChunk;  // one array of a parity
    float* stats = reinterpret_cast<float*>(shared + S::kProj + cut.set * S::kHead) + parity * 3 * kStride + g;
    if (column >= d) return;
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int u = 0; u < kUnits; ++u) {
                float x[kTiles][2];
#pragma unroll
                for (int n = 0; n < kTiles; ++n) {
                    x[n][0] = out[r][u * kTiles + n][2 * h];
                    x[n][1] = out[r][u * kTiles + n][2 * h + 1];
                }
                const Moments m = moments<kTiles>(x);
                if (lane % 4 == 0) {
                    float* to = stats + (in_set / kWidth + u) * kChunk + 16 * r + 8 * h;
                    to[0] = m.top, to[kStride] = m.mean, to[2 * kStride] = m.squares;
                }
            }
    if (heads > S::kColumns) barrier_sync(kNormed, 32 * cut.set * (d / S::kColumns));
    else __syncwarp();
    const float share = reciprocal(heads), part = reciprocal(per_group);
    const float* weights = p.norm_weight + at.first_head * d + in_set + c;
    const float* biases = p.norm_bias + at.first_head * d + in_set + c;
    gates += g * S::kPitch + c;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
        const float* from_group = stats + (in_set / kWidth + u) / per_group * per_group * kChunk;
        float2 w[kTiles], b[kTiles];
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
            w[n] = *reinterpret_cast<const float2*>(weights + 8 * (u * kTiles + n));
            b[n] = *reinterpret_cast<const float2*>(biases + 8 * (u * kTiles + n));
        }
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const float* from = from_group + 16 * r + 8 * h;
                float top = from[0], mean = from[kStride], squares = from[2 * kStride];
#pragma unroll 1
                for (int i = 1; i < per_group; ++i) {  // i units so far, each of the size of the one to come
                    const float next = from[i * kChunk], most = fmaxf(top, next), scale = reciprocal(most);
                    const float old_unit = top * scale, new_unit = next * scale, count = static_cast<float>(i);
                    const float new_mean = from[i * kChunk + kStride] * new_unit;
                    const float gap = new_mean - mean * old_unit, fraction = reciprocal(count + 1.0f);
                    mean = fmaf(gap, fraction, mean * old_unit);
                    squares = squares * old_unit * old_unit + from[i * kChunk + 2 * kStride] * new_unit * new_unit
                              + gap * gap * (kWidth * count * fraction);
                    top = most;
                }
                const float scale = reciprocal(top);
                const float factor = rsqrtf(squares * share + fmaxf(p.epsilon * scale * scale, kLeastEpsilon));
                const float first = scale * factor, second = -mean * factor;
#pragma unroll
                for (int n = 0; n < kTiles; ++n) {
                    const int at_tile = u * kTiles + n;
                    uint32_t* gate = reinterpret_cast<uint32_t*>(gates + (16 * r + 8 * h) * S::kPitch + 8 * at_tile);
                    const float2 z = unpack<T>(*gate);
                    const float x = fmaf(out[r][at_tile][2 * h], first, second);
                    const float y = fmaf(out[r][at_tile][2 * h + 1], first, second);
                    *gate = pack<T>(fmaf(x, w[n].x, b[n].x) * __fdividef(z.x, 1.0f + __expf(-z.x)),
                                    fmaf(y, w[n].y, b[n].y) * __fdividef(z.y, 1.0f + __expf(-z.y)));
                }
            }
    }
}

// H is a multiple of 16.
template <typename T, int D>
__device__ __forceinline__ void
normalise(const AttentionParams& p, const Cut& cut, const Place& at, char* shared, T* gates,
          const float (&out)[4][Shape<D>::kColumns / 8][4], int unit, int column, int parity) {
    constexpr int kTiles = Shape<D>::kColumns / 8;
    if (kTiles == 2 || p.num_heads % 32 == 0)
        normalise_units<T, D, kTiles>(p, cut, at, shared, gates, out, unit, column, parity);
    else
        normalise_units<T, D, 2>(p, cut, at, shared, gates, out, unit, column, parity);
}

}  // namespace dijiang::prefill
