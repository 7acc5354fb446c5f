// The two groups that make outputs of the slice's columns, chunks in turn: read-out, GroupNorm and gate.
#pragma once

#include "attention/prefill/hopper/norm.cuh"
#include "attention/prefill/hopper/slices/shape.cuh"

namespace dijiang::prefill::hopper::slices {

template <typename T, int D> __device__ __forceinline__ void make_outputs(const Walk<D>& walk, int group) {
    using S = Slice<D>;
    constexpr int kWide = S::kColumns;
    const AttentionParams& p = walk.p;
    const SliceBarriers<D>& barriers = walk.barriers;
    const int gates = S::kGates + group * S::kColumnTile;
    const auto load_gates = [&](int chunk) {
        load_rows<kWide>(walk.memory_at + gates,
                         walk.at.gate + static_cast<int64_t>(walk.at.first_chunk + chunk) * kChunk * p.gate_token_stride,
                         p.gate_token_stride, walk.left(chunk));
    };
    if (group >= walk.chunks) return;
    load_gates(group);
    // Before that other things come through the stages of queries and values.
    await_phase(barriers.state_full(group), 0);
    static_assert(S::kStages == S::kOutputGroups);
    const uint32_t queries = walk.memory_at + S::kQueries + group * S::kQueryStage;
    const int turns = (walk.chunks - group + S::kOutputGroups - 1) / S::kOutputGroups;
#pragma unroll 1
    for (int turn = 0; turn < turns; ++turn) {
        const int chunk = turn * S::kOutputGroups + group, i = walk.chunks_before() + chunk;
        const int value_stage = i % S::kValueStages;
        const uint32_t values = walk.memory_at + S::kValues + value_stage * S::kColumnTile;
        const uint32_t state = walk.memory_at + S::kState;
        float out[kWide / 8][4];
        await_phase(barriers.values_full(value_stage), i / S::kValueStages & 1);
        await_phase(barriers.queries_full(group), walk.parts() / S::kStages + turn & 1);
        begin_products();
#pragma unroll
        for (int k = 0; k < kChunk / 16; ++k)
            Wgmma<T, kWide>::template shared<0, 1>(out, S::Tile::across(queries + S::kTile, kChunk, k),
                                                   S::Tile::down(values, kChunk, 0, k), k > 0);
        end_products();
        await_phase(barriers.state_full(group), turn & 1);
        float scale = 1.0f;
        if constexpr (kUnit<T> != 1.0f) {  // rarely not 1: see state.cuh
            await_products<0>();
            scale = *reinterpret_cast<const float*>(walk.memory + S::kScale);
            if (scale != 1.0f) {
#pragma unroll
                for (int n = 0; n < kWide / 8; ++n)
#pragma unroll
                    for (int j = 0; j < 4; ++j) out[n][j] *= scale;
            }
        }
        begin_products();
#pragma unroll
        for (int k = 0; k < D / 16; ++k)
            Wgmma<T, kWide>::template shared<0, 0>(out, S::Tile::across(queries, kChunk, k),
                                                   S::Tile::across(state, kChunk, k), 1);
        end_products();
        await_products<0>();
        warp_arrives(barriers.state_empty());
        warp_arrives_everywhere<S::kBlocks>(barriers.queries_empty(group));
        warp_arrives(barriers.values_empty(value_stage));
        if (scale != 1.0f) {
#pragma unroll
            for (int n = 0; n < kWide / 8; ++n)
#pragma unroll
                for (int j = 0; j < 4; ++j) out[n][j] *= 1.0f / scale;
        }
        wait_copies<0>();
        __syncwarp();
        normalise<T, kWide>(p, out, walk.at.first_head * D + walk.slice * kWide, walk.memory + gates);
        __syncwarp();
        // The warp's finished rows: 16 bytes a lane.
        const int left = walk.left(chunk);
        uint16_t* to = walk.at.output
                       + static_cast<int64_t>(walk.at.first_chunk + chunk) * kChunk * p.output_token_stride;
        each_piece<kWide>([&](uint32_t from, int row, int piece) {
            if (row < left)
                *reinterpret_cast<uint4*>(to + row * p.output_token_stride + 8 * piece) =
                    *reinterpret_cast<const uint4*>(walk.memory + gates + from);
        });
        __syncwarp();
        if (turn + 1 < turns) load_gates(chunk + S::kOutputGroups);
    }
}

}  // namespace dijiang::prefill::hopper::slices
