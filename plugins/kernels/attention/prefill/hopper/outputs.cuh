// The group that makes outputs: scores, read-out, GroupNorm and gate.
#pragma once

#include "attention/prefill/hopper/norm.cuh"

namespace dijiang::prefill::hopper {

// Decayed causal scores in accumulators -> packed, in units of kUnit.
template <typename T>
__device__ __forceinline__ void fade_scores(const float (&sum)[kChunk / 8][4], float log2_decay, uint32_t (&scores)[kChunk / 8][2]) {
#pragma unroll
    for (int n = 0; n < kChunk / 8; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int gap = fragment_row() + 8 * i - fragment_column() - 8 * n;  // tokens back
            const float x = gap >= 0 ? fast_exp2(log2_decay * gap) : 0.0f;
            const float y = gap >= 1 ? fast_exp2(log2_decay * (gap - 1)) : 0.0f;
            scores[n][i] = pack<T>(sum[n][2 * i] * (x * (1.0f / kUnit<T>)), sum[n][2 * i + 1] * (y * (1.0f / kUnit<T>)));
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
            const int item = chunk * H + h, stage = item % S::kStages, parity = item / S::kStages & 1;
            const int state_stage = item % S::kStateStages;
            const uint32_t queries = memory_at + S::kQueries + stage * S::kTile;
            uint32_t scores[kChunk / 8][2];
            {
                float sum[kChunk / 8][4];
                await_phase(barriers.features_full(false, stage), parity);
                await_phase(barriers.features_full(true, stage), parity);
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
                        mine, S::Tile::across(queries, kChunk, k),
                        S::Tile::down(memory_at + S::kStates + state_stage * S::kMatrix, D, 0, k), k > 0);
                end_products();
                await_products<1>();
                warp_arrives(barriers.features_empty(true, stage));
                fade_scores<T>(sum, decay[h], scores);
            }
            await_products<0>();
            warp_arrives(barriers.features_empty(false, stage));
            float back = 1.0f / kUnit<T>;
            if (kUnit<T> != 1.0f) back *= reciprocal(reinterpret_cast<const float*>(memory + S::kScales)[state_stage]);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float fade = fast_exp2(decay[h] * (fragment_row() + 8 * i + 1)) * back;
#pragma unroll
                for (int n = 0; n < S::kTiles; ++n) mine[n][2 * i] *= fade, mine[n][2 * i + 1] *= fade;
            }
            begin_products();
#pragma unroll
            for (int k = 0; k < kChunk / 16; ++k)
                Wgmma<T, D>::template registers<1>(
                    mine, scores[2 * k][0], scores[2 * k][1], scores[2 * k + 1][0], scores[2 * k + 1][1],
                    S::Tile::down(memory_at + S::kValues + item % S::kValueStages * S::kTile, kChunk, 0, k), 1);
            end_products();
            await_products<0>();
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
        const int lane = opaque(lane_of());
#pragma unroll
        for (int h = 0; h < H; ++h)
#pragma unroll
            for (int j = 0; j < D / 16; ++j) {
                const int i = lane + 32 * j, row = 16 * warp_of() + i / (D / 8), piece = i % (D / 8);
                if (row < count)
                    *reinterpret_cast<uint4*>(to + row * p.output_token_stride + h * D + 8 * piece) =
                        *reinterpret_cast<const uint4*>(gates + h * S::kTile + S::Tile::offset(kChunk, row, 8 * piece));
            }
        __syncwarp();
        if (chunk + 1 < chunks) load_gates(chunk + 1);
    }
}

}  // namespace dijiang::prefill::hopper
