// The two groups that make features, of queries and of keys: as they are for the scores; for the state, weighted by what is
// left of it at a query, and of a key at the chunk's end.
#pragma once

#include "attention/prefill/hopper/features.cuh"

namespace dijiang::prefill::hopper {

template <typename T, int D, bool kKeys>
__device__ __forceinline__ void make_features(const AttentionParams& p, const Place& at, const float* decay, char* memory,
                                              uint32_t memory_at) {
    using S = Shape<D>;
    constexpr int kRaw = kKeys ? S::kRawKey : S::kRawQuery, kMade = kKeys ? S::kKeys : S::kQueries;
    const Barriers<D> barriers{memory_at + S::kBarriers};
    const int chunks = at.last_chunk - at.first_chunk, items = chunks * S::kHeads;
    const int shared_by = p.num_heads / p.num_kv_heads;
    const auto load = [&](int item) {
        const int chunk = at.first_chunk + item / S::kHeads, head = at.first_head + item % S::kHeads;
        const int64_t first = at.row * p.qkv_batch_stride + static_cast<int64_t>(chunk) * kChunk * p.qkv_token_stride
                              + (kKeys ? p.num_heads + head / shared_by : head) * D;
        load_rows<D>(memory_at + kRaw, p.qkv, first, p.qkv_token_stride, at.length - chunk * kChunk);
    };
    const RotaryLane rotary(p.rotary_dim / 2);
    int made = 0;  // items of both walks
    for (int walk = kKeys && at.segment + 1 < at.segments ? 1 : 2; walk <= 2; ++walk) {
        load(0);
        for (int item = 0; item < items; ++item, ++made) {
            const int first = (at.first_chunk + item / S::kHeads) * kChunk, end = min(kChunk, at.length - first);
            wait_copies<0>();
            __syncwarp();
            uint32_t packed[S::kTiles][2];
            {
                float logits[S::kTiles][4];
                project<T, D>(p, rotary, memory, memory_at, kRaw, at.position + first, kKeys ? kKeyGroup : kQueryGroup, logits);
                if (item + 1 < items) load(item + 1);
                softmax_rows<T, S::kTiles>(logits, packed);
            }
            constexpr int kStages = kKeys ? S::kStages : S::kQueryStages;
            const int stage = item % kStages;
            if (walk == 2) {
                await_phase(barriers.features_empty(kKeys, stage), item / kStages & 1 ^ 1);
                store_fragment<D>(memory_at + kMade + stage * S::kTile, packed);
                if constexpr (kKeys) {
                    show_to_products();
                    warp_arrives(barriers.features_full(true, stage));
                }
            }
            const float log2_decay = item % S::kHeads == 0 ? decay[0] : decay[S::kHeads - 1];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                // What is left of a key at the chunk's end; of the state before the chunk at a query.
                const int t = fragment_row() + 8 * i, steps = kKeys ? end - 1 - t : t + 1;
                const float left = kKeys && t >= end ? 0.0f : fast_exp2(log2_decay * steps) * (kStateUnit<T> / kUnit<T>);
                const uint32_t weight = pack<T>(left, left);
#pragma unroll
                for (int n = 0; n < S::kTiles; ++n) packed[n][i] = multiply<T>(packed[n][i], weight);
            }
            if constexpr (kKeys) {
                await_phase(barriers.weighted_empty(), made & 1 ^ 1);
                store_fragment<D>(memory_at + S::kWeighted, packed);
                show_to_products();
                warp_arrives(barriers.weighted_full());
            } else {
                store_fragment<D>(memory_at + S::kFaded + stage * S::kTile, packed);
                show_to_products();
                warp_arrives(barriers.features_full(false, stage));
            }
        }
    }
}

}  // namespace dijiang::prefill::hopper
