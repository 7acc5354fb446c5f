// The group that makes outputs: scores, read-out, GroupNorm and gate.
#pragma once

#include "attention/prefill/hopper/norm.cuh"

namespace dijiang::prefill::hopper {

// Decayed causal scores in accumulators -> packed, in units of kUnit.
template <typename T>
__device__ __forceinline__ void fade_scores(const float (&sum)[kChunk / 8][4], float log2_decay, uint32_t (&scores)[kChunk / 8][2]) {
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
__device__ __forceinline__ void make_outputs(const AttentionParams& p, const Place& at, const float* decay, char* memory,
                                             uint32_t memory_at) {
    using S = Shape<D>;
    constexpr int H = S::kHeads;
    const Barriers<D> barriers{memory_at + S::kBarriers};
    const int chunks = at.last_chunk - at.first_chunk;
    const auto load_gates = [&](int chunk) {
#pragma unroll
        for (int h = 0; h < H; ++h)
            load_rows<D>(memory_at + S::kGates + h * S::kTile, p.gate,
                         at.row * p.gate_batch_stride + static_cast<int64_t>(at.first_chunk + chunk) * kChunk * p.gate_token_stride
                             + (at.first_head + h) * D,
                         p.gate_token_stride, at.length - (at.first_chunk + chunk) * kChunk);
    };
    load_gates(0);
    for (int chunk = 0; chunk < chunks; ++chunk) {
        float out[H * S::kTiles][4];
#pragma unroll
        for (int h = 0; h < H; ++h) {
            float(&mine)[S::kTiles][4] = reinterpret_cast<float(&)[S::kTiles][4]>(out[h * S::kTiles]);
            const int item = chunk * H + h, stage = item % S::kStages, query_stage = item % S::kQueryStages;
            const int state_stage = item % S::kStateStages;
            const uint32_t queries = memory_at + S::kQueries + query_stage * S::kTile;
            uint32_t scores[kChunk / 8][2];
            {
                float sum[kChunk / 8][4];
                await_phase(barriers.features_full(false, query_stage), item / S::kQueryStages & 1);
                await_phase(barriers.features_full(true, stage), item / S::kStages & 1);
                begin_products();
#pragma unroll
                for (int k = 0; k < D / 16; ++k)
                    Wgmma<T, kChunk>::template shared<0, 0>(
                        sum, S::Tile::across(queries, kChunk, k),
                        S::Tile::across(memory_at + S::kKeys + stage * S::kTile, kChunk, k), k > 0);
                end_products();
                await_phase(barriers.state_full(state_stage), item / S::kStateStages & 1);
                begin_products();
#pragma unroll
                for (int k = 0; k < D / 16; ++k)
                    Wgmma<T, D>::template shared<0, 1>(
                        mine, S::Tile::across(memory_at + S::kFaded + query_stage * S::kTile, kChunk, k),
                        S::Tile::down(memory_at + S::kStates + state_stage * S::kMatrix, D, 0, k), k > 0);
                end_products();
                await_products<1>();
                warp_arrives(barriers.features_empty(true, stage));
                fade_scores<T>(sum, decay[h], scores);
            }
            if (kUnit<T> != 1.0f) {
                const float scale = reinterpret_cast<const float*>(memory + S::kScales)[state_stage];
                if (scale != 1.0f) {  // rare: see states.cuh
                    await_products<0>();
#pragma unroll
                    for (int n = 0; n < S::kTiles; ++n)
#pragma unroll
                        for (int i = 0; i < 4; ++i) mine[n][i] *= 1.0f / scale;
                }
            }
            begin_products();
#pragma unroll
            for (int k = 0; k < kChunk / 16; ++k)
                Wgmma<T, D>::template registers<1>(
                    mine, scores[2 * k][0], scores[2 * k][1], scores[2 * k + 1][0], scores[2 * k + 1][1],
                    S::Tile::down(memory_at + S::kValues + item % S::kValueStages * S::kTile, kChunk, 0, k), 1);
            end_products();
            await_products<0>();
            warp_arrives(barriers.features_empty(false, query_stage));
            warp_arrives(barriers.state_empty(state_stage));
        }
        wait_copies<0>();  // the gates
        __syncwarp();
        char* const gates = memory + S::kGates;
        normalise<T, D>(p, out, at.first_head, gates);
        __syncwarp();
        // The warp's finished rows: 16 bytes a lane.
        const int count = at.length - (at.first_chunk + chunk) * kChunk;
        T* to = static_cast<T*>(p.output) + at.row * p.output_batch_stride
                + static_cast<int64_t>(at.first_chunk + chunk) * kChunk * p.output_token_stride + at.first_head * D;
#pragma unroll
        for (int h = 0; h < H; ++h)
            each_piece<D>([&](uint32_t from, int row, int piece) {
                if (row < count)
                    *reinterpret_cast<uint4*>(to + row * p.output_token_stride + h * D + 8 * piece) =
                        *reinterpret_cast<const uint4*>(gates + h * S::kTile + from);
            });
        __syncwarp();
        if (chunk + 1 < chunks) load_gates(chunk + 1);
    }
}

}  // namespace dijiang::prefill::hopper
