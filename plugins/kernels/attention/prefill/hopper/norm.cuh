// GroupNorm and gate on a chunk's outputs in accumulators.
#pragma once

#include "attention/prefill/hopper/features.cuh"
#include "attention/terms.cuh"

namespace dijiang::prefill::hopper {

// Of `kUnits` units of kTiles tiles of columns of a lane's two rows: mean and sum of squares about it. All take each
// step together, because a step is short and its latency is not. Nothing here overflows below 1e18.
template <int kUnits> struct Moments {
    float mean[kUnits][2], squares[kUnits][2];
};

template <int kTiles, int kUnits, int N>
__device__ __forceinline__ void measure(const float (&out)[N][4], Moments<kUnits>& m) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            m.mean[u][i] = 0.0f;
#pragma unroll
            for (int n = u * kTiles; n < (u + 1) * kTiles; ++n) m.mean[u][i] += out[n][2 * i] + out[n][2 * i + 1];
        }
#pragma unroll
    for (int s = 1; s <= 2; s *= 2)
#pragma unroll
        for (int u = 0; u < kUnits; ++u)
#pragma unroll
            for (int i = 0; i < 2; ++i) m.mean[u][i] += __shfl_xor_sync(~0u, m.mean[u][i], s);
#pragma unroll
    for (int u = 0; u < kUnits; ++u)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            m.mean[u][i] *= 1.0f / (8 * kTiles);
            m.squares[u][i] = 0.0f;
#pragma unroll
            for (int n = u * kTiles; n < (u + 1) * kTiles; ++n) {
                const float a = out[n][2 * i] - m.mean[u][i], b = out[n][2 * i + 1] - m.mean[u][i];
                m.squares[u][i] = fmaf(a, a, fmaf(b, b, m.squares[u][i]));
            }
        }
#pragma unroll
    for (int s = 1; s <= 2; s *= 2)
#pragma unroll
        for (int u = 0; u < kUnits; ++u)
#pragma unroll
            for (int i = 0; i < 2; ++i) m.squares[u][i] += __shfl_xor_sync(~0u, m.squares[u][i], s);
}

// Normalises the groups, of kTiles tiles each from channel `first` on, and gates them into the gates' tiles, one per
// head.
template <typename T, int D, int kTiles, int N>
__device__ __forceinline__ void normalise_groups(const AttentionParams& p, const float (&out)[N][4], int first,
                                                 char* gates) {
    using S = Shape<D>;
    constexpr int kGroups = N / kTiles;
    Moments<kGroups> m;
    measure<kTiles, kGroups>(out, m);
    const float floor = kUnit<T> * kUnit<T> * fmaxf(p.epsilon, kLeastEpsilon);
    const int channel = first + fragment_column();
    const uint32_t start = S::Tile::start(fragment_row());  // eight rows further on pieces are turned as much
#pragma unroll
    for (int u = 0; u < kGroups; ++u) {
        float by[2], more[2];  // x -> x by + more normalises
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            by[i] = fast_rsqrt(fmaf(m.squares[u][i], 1.0f / (8 * kTiles), floor));
            more[i] = -m.mean[u][i] * by[i];
        }
#pragma unroll
        for (int n = u * kTiles; n < (u + 1) * kTiles; ++n) {
            const float2 w = *reinterpret_cast<const float2*>(p.norm_weight + channel + 8 * n);
            const float2 b = *reinterpret_cast<const float2*>(p.norm_bias + channel + 8 * n);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                uint32_t* gate = reinterpret_cast<uint32_t*>(
                    gates + S::Tile::piece(start, kChunk, n % S::kTiles) + n / S::kTiles * S::kTile
                    + 8 * i * S::Tile::kRow + 2 * fragment_column());
                const float2 z = unpack<T>(*gate);
                const float x = fmaf(out[n][2 * i], by[i], more[i]);
                const float y = fmaf(out[n][2 * i + 1], by[i], more[i]);
                *gate = pack<T>(fmaf(x, w.x, b.x) * fast_silu(z.x), fmaf(y, w.y, b.y) * fast_silu(z.y));
            }
        }
    }
}

// H is a whole number of tiles, and divides the columns: see schedule.cpp.
template <typename T, int D, int N>
__device__ __forceinline__ void normalise(const AttentionParams& p, const float (&out)[N][4], int first,
                                          char* gates) {
    if constexpr (Shape<D>::kHeads > 1) {
        if (p.num_heads == 16)
            normalise_groups<T, D, 2>(p, out, first, gates);
        else
            normalise_groups<T, D, 4>(p, out, first, gates);
    } else {
        if (p.num_heads == 8)
            normalise_groups<T, D, 1>(p, out, first, gates);
        else if (p.num_heads == 16)
            normalise_groups<T, D, 2>(p, out, first, gates);
        else
            normalise_groups<T, D, 4>(p, out, first, gates);
    }
}

}  // namespace dijiang::prefill::hopper
