// What a group does with rows of a chunk: features, and their weights.
#pragma once

#include "attention/prefill/hopper/spans/shape.cuh"

namespace dijiang::prefill::hopper::spans {

template <typename T, int D> struct FeatureFinder {
    using S = Span<D>;
    using Features = uint32_t[S::kTiles][2];
    const AttentionParams& p;
    const Place& at;
    char* memory;
    uint32_t memory_at;
    int group;
    float decay;

    // Rows that this warp has loaded -> the group's features. then(): as soon as nobody reads the rows.
    template <typename F>
    __device__ __forceinline__ void find(int tile, int first_token, Features& packed, F&& then) const {
        float logits[S::kTiles][4];
        __syncwarp();
        rotate_rows<T, D>(RotaryLane(reinterpret_cast<const uint32_t*>(memory + S::kLanes)), p.rotary_dim / 2,
                          reinterpret_cast<const float4*>(memory + S::kTurns), memory + tile,
                          at.position + first_token);
        show_to_products();
        barrier_sync(meeting_of(group), kGroup);
        const uint32_t rows = memory_at + tile, proj = memory_at + S::kProj;
        begin_products();
#pragma unroll
        for (int k = 0; k < D / 16; ++k)
            Wgmma<T, D>::template shared<0, 1>(logits, S::Tile::across(rows, kChunk, k), S::Tile::down(proj, D, 0, k),
                                               k > 0);
        end_products();
        await_products<0>();
        barrier_sync(meeting_of(group), kGroup);
        then();
        softmax_rows<T, S::kTiles>(logits, packed);
    }

    // Features of a chunk times what is left of a key at its end, of the state at a query.
    __device__ __forceinline__ void weigh(int first_token, bool of_keys, Features& packed) const {
        weigh_rows<T>(min(kChunk, at.length - first_token), of_keys, decay, packed);
    }
};

}  // namespace dijiang::prefill::hopper::spans
