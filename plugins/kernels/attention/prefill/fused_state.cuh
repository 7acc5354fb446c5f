// A consumer warp's part of the state, transposed, in the accumulators of its products: reading and writing it,
// reading out of it, adding a chunk to it.
#pragma once

#include "attention/prefill/fused_norm.cuh"
#include "attention/prefill/state_tile.cuh"

namespace dijiang::prefill {

template <int D> using StateTile = float[Shape<D>::kColumns / 16][D / 8][4];

// Calls f(address of a state's element [feature, value], register) for the elements that this lane holds.
template <int D, typename F>
__device__ __forceinline__ void each_element(StateTile<D>& state, int size, int column, F&& f) {
    const int d = Shape<D>::kWide ? D : opaque(size);  // or every element's offset would be kept between two uses
    const int lane = fresh_lane(), g = lane / 4, c = 2 * (lane % 4);
#pragma unroll
    for (int m = 0; m < Shape<D>::kColumns / 16; ++m)
#pragma unroll
        for (int n = 0; n < D / 8; ++n)
            if (8 * n < d && column + 16 * m < d) {
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    f((8 * n + c + i % 2) * d + column + 16 * m + g + 8 * (i / 2), state[m][n][i]);
            }
}

// A slot of the workspace holds a warp's registers, 128 floats at a time.
template <int D> __device__ __forceinline__ void store_slot(float* slot, const StateTile<D>& state) {
    slot += 4 * fresh_lane();
#pragma unroll
    for (int m = 0; m < Shape<D>::kColumns / 16; ++m)
#pragma unroll
        for (int n = 0; n < D / 8; ++n)
            *reinterpret_cast<float4*>(slot + (m * (D / 8) + n) * 128) =
                make_float4(state[m][n][0], state[m][n][1], state[m][n][2], state[m][n][3]);
}

// state = state * keep + slot, past the first-level cache: another block may have written it.
template <int D> __device__ __forceinline__ void add_slot(const float* slot, float keep, StateTile<D>& state) {
    slot += 4 * fresh_lane();
#pragma unroll
    for (int m = 0; m < Shape<D>::kColumns / 16; ++m)
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
            const float4 x = __ldcg(reinterpret_cast<const float4*>(slot + (m * (D / 8) + n) * 128));
            state[m][n][0] = fmaf(state[m][n][0], keep, x.x);
            state[m][n][1] = fmaf(state[m][n][1], keep, x.y);
            state[m][n][2] = fmaf(state[m][n][2], keep, x.z);
            state[m][n][3] = fmaf(state[m][n][3], keep, x.w);
        }
}

// The power of two that brings numbers of magnitude up to `bound` below 2^12: room to grow up to float16's 2^16.
__device__ __forceinline__ float power_below(float bound) {
    const int exponent = static_cast<int>(__float_as_uint(bound) >> 23 & 255) - 127;  // bound < 2^(exponent + 1)
    return __uint_as_float((127 + max(11 - exponent, -120)) << 23);
}

// out = e^A phi(q) S for the tokens of `out`; `back` undoes the state's scale.
template <typename T, int D>
__device__ __forceinline__ void read_state(const StateTile<D>& state, uint32_t query_at, const float* fade, float back,
                                           ReadOut<D>& out) {
    using S = Shape<D>;
    constexpr int M = S::kColumns / 16, V = S::kColumns / 8, R = S::kReadTiles;
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
        for (int n = 0; n < V; ++n) out[r][n][0] = out[r][n][1] = out[r][n][2] = out[r][n][3] = 0.0f;
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
        uint32_t b[V][2];
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h)
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    b[2 * m + h][i] = pack<T>(state[m][2 * k + i][2 * h], state[m][2 * k + i][2 * h + 1]);
#pragma unroll
        for (int r = 0; r < R; ++r) {
            uint32_t a[4];
            ldmatrix(a, query_at + 2 * (16 * r * S::kPitch + 16 * k));
#pragma unroll
            for (int n = 0; n < V; ++n) mma<T>(out[r][n], a, b[n][0], b[n][1]);
        }
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
        const int g = fresh_lane() / 4;
        const float upper = fade[16 * r + g] * back, lower = fade[16 * r + g + 8] * back;
#pragma unroll
        for (int n = 0; n < V; ++n) {
            out[r][n][0] *= upper, out[r][n][1] *= upper;
            out[r][n][2] *= lower, out[r][n][3] *= lower;
        }
    }
}

// out += scores v for the tokens of `out`, which begin at the chunk's tile `first`.
template <typename T, int D>
__device__ __forceinline__ void read_chunk(uint32_t score_at, uint32_t value_at, int first, ReadOut<D>& out) {
    using S = Shape<D>;
    constexpr int M = S::kColumns / 16, R = S::kReadTiles;
    const auto add = [&](int k, int row) {  // tokens of tile k, for rows from `row` on
        uint32_t b[M][4];
#pragma unroll
        for (int m = 0; m < M; ++m) ldmatrix_trans(b[m], value_at + 2 * (16 * k * S::kValuePitch + 16 * m));
#pragma unroll
        for (int r = 0; r < R; ++r) {
            if (r < row) continue;
            uint32_t a[4];
            ldmatrix(a, score_at + 2 * (16 * r * S::kScorePitch + 16 * k));
#pragma unroll
            for (int m = 0; m < M; ++m) {
                mma<T>(out[r][2 * m], a, b[m][0], b[m][2]);
                mma<T>(out[r][2 * m + 1], a, b[m][1], b[m][3]);
            }
        }
    };
    if constexpr (R < 4) {
#pragma unroll 1
        for (int k = 0; k < first; ++k) add(k, 0);
    }
#pragma unroll
    for (int k = 0; k < R; ++k) add(first + k, k);
}

// The largest magnitude of the warp's state.
template <int D> __device__ __forceinline__ float largest_of(const StateTile<D>& state) {
    float bound = 0.0f;
#pragma unroll
    for (int m = 0; m < Shape<D>::kColumns / 16; ++m)
#pragma unroll
        for (int n = 0; n < D / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) bound = fmaxf(bound, fabsf(state[m][n][i]));
    return warp_max(bound);
}

// state += (weight v)^T phi(k) for a chunk. Returns, of float16, the largest magnitudes of what was multiplied.
template <typename T, int D>
__device__ __forceinline__ uint32_t
add_chunk(StateTile<D>& state, const ChunkTerms& decay, uint32_t key_at, uint32_t value_at, float ratio) {
    using S = Shape<D>;
    constexpr int M = S::kColumns / 16, F = D / 8;
    constexpr bool kHalf = kFeatureUnit<T> != 1.0f;
    uint32_t largest = 0;
#pragma unroll 1
    for (int k = 0; k < 4; ++k) {
        const uint32_t* weights = static_cast<const uint32_t*>(decay.weight) + 8 * k + fresh_lane() % 4;
        const uint32_t early = weights[0], late = weights[4];
        uint32_t a[M][4];
#pragma unroll
        for (int m = 0; m < M; ++m) {
            ldmatrix_trans(a[m], value_at + 2 * (16 * k * S::kValuePitch + 16 * m));
#pragma unroll
            for (int i = 0; i < 4; ++i) a[m][i] = multiply<T>(a[m][i], i < 2 ? early : late);
        }
        if (kHalf && ratio != 1.0f) {
            const uint32_t scale = pack<T>(ratio, ratio);
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int i = 0; i < 4; ++i) a[m][i] = multiply<T>(a[m][i], scale);
        }
        if (kHalf) {
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int i = 0; i < 4; ++i) largest = larger(largest, a[m][i]);
        }
#pragma unroll
        for (int n = 0; n < F / 2; ++n) {
            uint32_t b[4];
            ldmatrix_trans(b, key_at + 2 * (16 * k * S::kPitch + 16 * n));
#pragma unroll
            for (int m = 0; m < M; ++m) {
                mma<T>(state[m][2 * n], a[m], b[0], b[1]);
                mma<T>(state[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
    return largest;
}

}  // namespace dijiang::prefill
