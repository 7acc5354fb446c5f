// The group that brings tiles: keys by one warp, queries and scores by another, values by the other two.
//
// All blocks of a cluster need the same keys, queries and scores. Each copies its share of a tile to all of them, once
// all have read what was there before.
#pragma once

#include "attention/prefill/hopper/slices/shape.cuh"
#include "device/overlap.cuh"

namespace dijiang::prefill::hopper::slices {

// One thread.
template <int D> __device__ __forceinline__ void fetch_keys(const Walk<D>& walk, const char* items) {
    using S = Slice<D>;
    constexpr int kShare = S::kTile / S::kBlocks;
    const int before = walk.chunks_before(), share = walk.rank * kShare;
#pragma unroll 1
    for (int i = 0; i < before + walk.chunks; ++i) {
        const int chunk = i < before ? i : i - before, stage = i % S::kKeyStages;
        const uint32_t full = walk.barriers.keys_full(stage);
        await_phase(walk.barriers.keys_empty(stage), i / S::kKeyStages & 1 ^ 1);
        expect_bytes(full, S::kTile);
        copy_bulk_to_all(walk.memory_at + S::kKeys + stage * S::kTile + share,
                         items + static_cast<int64_t>(chunk) * Item<D>::kBytes + Item<D>::kKeys + share, kShare, full,
                         S::kBlocks);
    }
}

// One thread.
template <int D> __device__ __forceinline__ void fetch_queries(const Walk<D>& walk, const char* items) {
    using S = Slice<D>;
    constexpr int kShare = S::kTile / S::kBlocks, kScoreShare = S::kScoreTile / S::kBlocks;
    const int parts = walk.parts(), share = walk.rank * kShare, score_share = walk.rank * kScoreShare;
#pragma unroll 1
    for (int i = 0; i < parts; ++i) {  // what the segments before this one have left, to this block alone
        const int stage = i % S::kQueryStages;
        const uint32_t full = walk.barriers.queries_full(stage);
        await_phase(walk.barriers.queries_empty(stage), i / S::kQueryStages & 1 ^ 1);
        expect_bytes(full, S::kPart);
        copy_bulk(walk.memory_at + S::kQueries + stage * S::kQueryStage,
                  reinterpret_cast<const char*>(walk.slot(i / 2 + 1)) + stage * S::kPart, S::kPart, full);
    }
#pragma unroll 1
    for (int chunk = 0; chunk < walk.chunks; ++chunk) {
        const int stage = chunk % S::kQueryStages;
        const uint32_t full = walk.barriers.queries_full(stage);
        const uint32_t to = walk.memory_at + S::kQueries + stage * S::kQueryStage;
        const char* const from = items + static_cast<int64_t>(chunk) * Item<D>::kBytes;
        await_phase(walk.barriers.queries_empty(stage), (parts + chunk) / S::kQueryStages & 1 ^ 1);
        expect_bytes(full, S::kQueryStage);
        copy_bulk_to_all(to + S::kTile + score_share, from + Item<D>::kScores + score_share, kScoreShare, full,
                         S::kBlocks);
        copy_bulk_to_all(to + share, from + Item<D>::kQueries + share, kShare, full, S::kBlocks);
    }
}

// The slice's columns of values: half a chunk's rows a warp. Zeros where the sequence has ended.
template <int D> __device__ __forceinline__ void fetch_values(const Walk<D>& walk, int half) {
    using S = Slice<D>;
    constexpr int kPieces = S::kColumns / 8, kRows = 32 / kPieces;  // of a turn
    const AttentionParams& p = walk.p;
    const int before = walk.chunks_before(), all = before + walk.chunks;
    const int row = half * (kChunk / 2) + lane_of() / kPieces, piece = lane_of() % kPieces;
    const uint16_t* const source = walk.at.qkv + (p.num_heads + p.num_kv_heads + walk.at.kv_head[0]) * D
                                   + walk.slice * S::kColumns + 8 * piece;
    const auto tell = [&](int i) {
        show_to_products();
        warp_arrives(walk.barriers.values_full(i % S::kValueStages));
    };
#pragma unroll 1
    for (int i = 0; i < all; ++i) {
        const int chunk = i < before ? i : i - before, stage = i % S::kValueStages, left = walk.left(chunk);
        const int first = (walk.at.first_chunk + chunk) * kChunk;
        await_phase(walk.barriers.values_empty(stage), i / S::kValueStages & 1 ^ 1);
#pragma unroll
        for (int j = 0; j < kChunk / 2 / kRows; ++j) {
            const int t = row + j * kRows;
            const bool there = t < left;
            copy_async(walk.memory_at + S::kValues + stage * S::kColumnTile + S::Tile::offset(kChunk, t, 8 * piece),
                       there ? source + static_cast<int64_t>(first + t) * p.qkv_token_stride : source, there);
        }
        commit_copies();
        if (i > 0) {
            wait_copies<1>();
            tell(i - 1);
        }
    }
    wait_copies<0>();
    tell(all - 1);
}

template <int D> __device__ __forceinline__ void fetch(const Walk<D>& walk, const char* items) {
    items += Item<D>::offset(walk.p, walk.at.row, walk.at.first_head, walk.at.first_chunk);
    const int warp = __shfl_sync(~0u, warp_of(), 0);
    if (warp < 2) {
        // What the segments before this one leave: each lane waits for one.
        if (warp == 1 && lane_of() < walk.parts() / 2)
            while (!load_acquire(walk.flag(lane_of()))) __nanosleep(40);
        __syncwarp();
        if (lane_of() == 0) {
            wait_for_previous_kernel();
            meet_async_reads();
            if (warp == 0)
                fetch_keys<D>(walk, items);
            else
                fetch_queries<D>(walk, items);
        }
    } else {
        fetch_values<D>(walk, warp - 2);
    }
}

}  // namespace dijiang::prefill::hopper::slices
