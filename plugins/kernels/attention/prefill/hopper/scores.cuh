// Decayed causal scores of a chunk's queries, in registers, with its keys.
#pragma once

#include "attention/prefill/hopper/features.cuh"

namespace dijiang::prefill::hopper {

// Decayed causal scores in accumulators -> packed, in units of kUnit.
template <typename T>
__device__ __forceinline__ void fade_scores(const float (&sum)[kChunk / 8][4], float log2_decay,
                                            uint32_t (&scores)[kChunk / 8][2]) {
    constexpr int kTiles = kChunk / 8;
    const float further = fast_exp2(8 * log2_decay);  // of a tile
    const int diagonal = 2 * warp_of();               // and the tile after it
    // Opaque, or the diagonal's factors would be kept in registers from chunk to chunk.
    const int ahead = opaque(fragment_row() - fragment_column());
    float left[4];
#pragma unroll
    for (int n = kTiles - 1; n >= 0; --n) {
        if (n > diagonal + 1) {
            scores[n][0] = scores[n][1] = 0;
        } else if (n >= diagonal) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int gap = ahead + i / 2 * 8 - i % 2 - 8 * n;  // tokens back
                left[i] = fast_exp2(log2_decay * max(gap, 0)) * (1.0f / kUnit<T>);
                if (gap < 0) left[i] = 0.0f;
            }
            scores[n][0] = pack<T>(sum[n][0] * left[0], sum[n][1] * left[1]);
            scores[n][1] = pack<T>(sum[n][2] * left[2], sum[n][3] * left[3]);
            if (n == diagonal) {
                // The upper triangle's own factors would be above 1: start from the row's first tile before it.
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int gap = ahead + i / 2 * 8 - i % 2 - 8 * (n - 1);
                    left[i] = fast_exp2(log2_decay * gap) * (1.0f / kUnit<T>);
                }
            }
        } else {
            scores[n][0] = pack<T>(sum[n][0] * left[0], sum[n][1] * left[1]);
            scores[n][1] = pack<T>(sum[n][2] * left[2], sum[n][3] * left[3]);
#pragma unroll
            for (int i = 0; i < 4; ++i) left[i] *= further;
        }
    }
}

template <typename T, int D>
__device__ __forceinline__ void find_scores(const uint32_t (&queries)[D / 8][2], uint32_t keys, float log2_decay,
                                            uint32_t (&scores)[kChunk / 8][2]) {
    float sum[kChunk / 8][4];
    begin_products();
#pragma unroll
    for (int k = 0; k < D / 16; ++k)
        Wgmma<T, kChunk>::template registers<0>(sum, queries[2 * k][0], queries[2 * k][1], queries[2 * k + 1][0],
                                                queries[2 * k + 1][1], Shape<D>::Tile::across(keys, kChunk, k), k > 0);
    end_products();
    await_products<0>();
    fade_scores<T>(sum, log2_decay, scores);
}

}  // namespace dijiang::prefill::hopper
