// The two groups that make features: as they are for the scores; for the state, weighted by what is left of it at a
// query, and of a key at the chunk's end. The first walk needs keys alone, and both groups make them in turn; in the
// second, one makes keys, and the other queries and scores.
#pragma once

#include "attention/prefill/hopper/scores.cuh"

namespace dijiang::prefill::hopper {

template <typename T, int D> struct FeatureMaker {
    using S = Shape<D>;
    const AttentionParams& p;
    const Place& at;
    char* memory;
    uint32_t memory_at;
    int group;  // 0: keys in the second walk

    __device__ __forceinline__ uint32_t raw() const { return S::kRaw + group * S::kTile; }
    __device__ __forceinline__ int first_token(int item) const { return (at.first_chunk + item / S::kHeads) * kChunk; }

    __device__ __forceinline__ void load(int item, bool keys) const {
        const int head = item % S::kHeads;
        const int column = (keys ? p.num_heads + at.kv_head[head] : at.first_head + head) * D;
        load_rows<D>(memory_at + raw(), at.qkv + first_token(item) * p.qkv_token_stride + column, p.qkv_token_stride,
                     at.length - first_token(item));
    }

    // Features of an item that was loaded; then loads the `next` one.
    __device__ __forceinline__ void make(int item, int next, int items, bool keys,
                                         uint32_t (&packed)[S::kTiles][2]) const {
        wait_copies<0>();
        __syncwarp();
        float logits[S::kTiles][4];
        const RotaryLane rotary(reinterpret_cast<const uint32_t*>(memory + S::kLanes));
        project<T, D>(p, rotary, memory, memory_at, raw(), at.position + first_token(item), kKeyGroup + group, logits);
        if (next < items) load(next, keys);
        softmax_rows<T, S::kTiles>(logits, packed);
    }

    __device__ __forceinline__ void weigh(int item, bool keys, float log2_decay,
                                          uint32_t (&packed)[S::kTiles][2]) const {
        weigh_rows<T>(min(kChunk, at.length - first_token(item)), keys, log2_decay, packed);
    }
};

template <typename T, int D>
__device__ __forceinline__ void make_features(const AttentionParams& p, const Place& at, char* memory,
                                              uint32_t memory_at, int group) {
    using S = Shape<D>;
    const Barriers<D> barriers{memory_at + S::kBarriers};
    const FeatureMaker<T, D> maker{p, at, memory, memory_at, group};
    const int items = (at.last_chunk - at.first_chunk) * S::kHeads;
    const auto decay_of = [&](int item) { return at.decay[item % S::kHeads]; };
    uint32_t packed[S::kTiles][2];
    int weighted = 0;  // tiles so far
    if (at.segment + 1 < at.segments) {
        if (group < items) maker.load(group, true);
        for (int item = group; item < items; item += 2, ++weighted) {
            maker.make(item, item + 2, items, true, packed);
            maker.weigh(item, true, decay_of(item), packed);
            await_phase(barriers.weighted_empty(group), weighted & 1 ^ 1);
            store_fragment<typename S::Tile>(memory_at + (group == 0 ? S::kWeighted : S::kKeys), packed);
            show_to_products();
            warp_arrives(barriers.weighted_full(group));
        }
        // Where the second group's tile was, keys will be.
        if (group == 1 && weighted > 0) await_phase(barriers.weighted_empty(1), weighted & 1 ^ 1);
        barrier_sync(kFeatureGroups, 2 * kGroup);
    }
    const bool keys = group == 0;
    maker.load(0, keys);
    for (int item = 0; item < items; ++item, ++weighted) {
        maker.make(item, item + 1, items, keys, packed);
        const int key_stage = item % S::kStages, key_turn = item / S::kStages & 1;
        if (keys) {
            await_phase(barriers.features_empty(true, key_stage), key_turn ^ 1);
            store_fragment<typename S::Tile>(memory_at + S::kKeys + key_stage * S::kTile, packed);
            show_to_products();
            warp_arrives(barriers.features_full(true, key_stage));
            maker.weigh(item, true, decay_of(item), packed);
            await_phase(barriers.weighted_empty(0), weighted & 1 ^ 1);
            store_fragment<typename S::Tile>(memory_at + S::kWeighted, packed);
            show_to_products();
            warp_arrives(barriers.weighted_full(0));
        } else {
            const int stage = item % S::kQueryStages;
            await_phase(barriers.features_full(true, key_stage), key_turn);
            uint32_t scores[kChunk / 8][2];
            find_scores<T, D>(packed, memory_at + S::kKeys + key_stage * S::kTile, decay_of(item), scores);
            warp_arrives(barriers.features_empty(true, key_stage));
            maker.weigh(item, false, decay_of(item), packed);
            await_phase(barriers.features_empty(false, stage), item / S::kQueryStages & 1 ^ 1);
            store_fragment<typename S::ScoreTile>(memory_at + S::kScores + stage * S::kScoreTile, scores);
            store_fragment<typename S::Tile>(memory_at + S::kFaded + stage * S::kTile, packed);
            show_to_products();
            warp_arrives(barriers.features_full(false, stage));
        }
    }
}

}  // namespace dijiang::prefill::hopper
