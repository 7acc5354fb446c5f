// The groups that make outputs: read-out, GroupNorm and gate.
#pragma once

#include "attention/prefill/hopper/norm.cuh"

namespace dijiang::prefill::hopper {

template <typename T, int D>
__device__ __forceinline__ void make_outputs(const AttentionParams& p, const Place& at, char* memory,
                                             uint32_t memory_at, int group) {
    using S = Shape<D>;
    constexpr int H = S::kHeads;
    const Barriers<D> barriers{memory_at + S::kBarriers};
    const int chunks = at.last_chunk - at.first_chunk;
    const auto load_gates = [&](int chunk) {
        const int first_token = (at.first_chunk + chunk) * kChunk;
#pragma unroll
        for (int h = 0; h < H; ++h)
            load_rows<D>(memory_at + S::kGates + (group * H + h) * S::kTile,
                         at.gate + first_token * p.gate_token_stride + h * D, p.gate_token_stride,
                         at.length - first_token);
    };
    if (group < chunks) load_gates(group);
    for (int chunk = group; chunk < chunks; chunk += S::kOutputGroups) {
        float out[H * S::kTiles][4];
#pragma unroll
        for (int h = 0; h < H; ++h) {
            float(&mine)[S::kTiles][4] = reinterpret_cast<float(&)[S::kTiles][4]>(out[h * S::kTiles]);
            const int item = chunk * H + h, query_stage = item % S::kQueryStages, state_stage = item % S::kStateStages;
            await_phase(barriers.features_full(false, query_stage), item / S::kQueryStages & 1);
            await_phase(barriers.state_full(state_stage), item / S::kStateStages & 1);
            begin_products();
#pragma unroll
            for (int k = 0; k < D / 16; ++k)
                Wgmma<T, D>::template shared<0, 1>(
                    mine, S::Tile::across(memory_at + S::kFaded + query_stage * S::kTile, kChunk, k),
                    S::Tile::down(memory_at + S::kStates + state_stage * S::kMatrix, D, 0, k), k > 0);
            if constexpr (kUnit<T> != 1.0f) {
                end_products();
                await_products<0>();
                const float scale = reinterpret_cast<const float*>(memory + S::kScales)[state_stage];
                if (scale != 1.0f) {  // rare: see states.cuh
#pragma unroll
                    for (int n = 0; n < S::kTiles; ++n)
#pragma unroll
                        for (int i = 0; i < 4; ++i) mine[n][i] *= 1.0f / scale;
                }
                begin_products();
            }
#pragma unroll
            for (int k = 0; k < kChunk / 16; ++k)
                Wgmma<T, D>::template shared<0, 1>(
                    mine, S::ScoreTile::across(memory_at + S::kScores + query_stage * S::kScoreTile, kChunk, k),
                    S::Tile::down(memory_at + S::kValues + item % S::kValueStages * S::kTile, kChunk, 0, k), 1);
            end_products();
            await_products<0>();
            warp_arrives(barriers.features_empty(false, query_stage));
            warp_arrives(barriers.state_empty(state_stage));
        }
        wait_copies<0>();
        __syncwarp();
        char* const gates = memory + S::kGates + group * (H * S::kTile);
        normalise<T, D>(p, out, at.first_head * D, gates);
        __syncwarp();
        // The warp's finished rows: 16 bytes a lane.
        const int count = at.length - (at.first_chunk + chunk) * kChunk;
        uint16_t* to = at.output + static_cast<int64_t>(at.first_chunk + chunk) * kChunk * p.output_token_stride;
#pragma unroll
        for (int h = 0; h < H; ++h)
            each_piece<D>([&](uint32_t from, int row, int piece) {
                if (row < count)
                    *reinterpret_cast<uint4*>(to + row * p.output_token_stride + h * D + 8 * piece) =
                        *reinterpret_cast<const uint4*>(gates + h * S::kTile + from);
            });
        __syncwarp();
        if (chunk + S::kOutputGroups < chunks) load_gates(chunk + S::kOutputGroups);
    }
}

}  // namespace dijiang::prefill::hopper
