// A block's walk for heads of 128: two groups of four warps share a chunk of a span of two.
//
// One finds the features of its keys, the other of its queries and their scores; then each makes half the columns of
// its outputs. In the first walk, which needs keys alone, each group has a chunk.
#pragma once

#include "attention/prefill/hopper/spans/walk.cuh"

namespace dijiang::prefill::hopper::spans {

template <typename T, int D> struct PairWalker {
    using S = Span<D>;
    using Features = uint32_t[S::kTiles][2];
    static constexpr int kHalf = kChunk / 2;
    static constexpr int kOutTiles = S::kTiles / 2;  // of columns: half a head
    const AttentionParams& p;
    const Place& at;
    char* memory;
    uint32_t memory_at;
    int group, chunks;  // of the segment
    float decay;

    __device__ __forceinline__ int mine(int span) const { return 2 * span + group / 2; }
    __device__ __forceinline__ bool of_queries() const { return group % 2 == 1; }
    __device__ __forceinline__ int first_token(int chunk) const { return (at.first_chunk + chunk) * kChunk; }
    __device__ __forceinline__ int tile(int first, int i) const { return first + i * S::kTile; }

    // A chunk's rows, if the segment has it: a batch of copies either way. `column`: of q, k and v together.
    __device__ __forceinline__ void load(int to, int chunk, int column) const {
        if (chunk < chunks)
            load_rows<D>(memory_at + to, at.qkv + first_token(chunk) * p.qkv_token_stride + column, p.qkv_token_stride,
                         at.length - first_token(chunk));
        else
            commit_copies();
    }
    __device__ __forceinline__ int column_of_keys() const { return (p.num_heads + at.kv_head[0]) * D; }
    __device__ __forceinline__ int column_of_values() const {
        return (p.num_heads + p.num_kv_heads + at.kv_head[0]) * D;
    }
    // What this group brings of a span: two batches.
    __device__ __forceinline__ void load_span(int span) const {
        const int i = group / 2;
        if (of_queries()) {
            load(tile(S::kQueries, i), mine(span), at.first_head * D);
            commit_copies();
        } else {
            load(tile(S::kKeys, i), mine(span), column_of_keys());
            load(tile(S::kValues, i), mine(span), column_of_values());
        }
    }
    // This group's half of the columns.
    __device__ __forceinline__ int gates() const { return tile(S::kGates, group / 2) + group % 2 * (S::kTile / 2); }
    __device__ __forceinline__ void load_gates(int span) const {
        if (mine(span) < chunks)
            load_rows<D / 2>(memory_at + gates(),
                             at.gate + first_token(mine(span)) * p.gate_token_stride + group % 2 * (D / 2),
                             p.gate_token_stride, at.length - first_token(mine(span)));
        else
            commit_copies();
    }

    // Outputs of this group's half of its chunk; scores are where the keys were.
    __device__ __forceinline__ void read_span(int span, Part<D>& part, float (&out)[kOutTiles][4]) const {
        const int chunk = group / 2, first = group % 2 * (D / 2);
        const uint32_t faded = memory_at + tile(S::kQueries, chunk);
        begin_products();
#pragma unroll
        for (int k = 0; k < D / 16; ++k)
            Wgmma<T, D / 2>::template shared<0, 1>(out, S::Tile::across(faded, kChunk, k),
                                                   S::Tile::down(memory_at + S::kState, D, 0, k)
                                                       + (first / 64 * (D * S::Tile::kRow) >> 4),
                                                   k > 0);
        end_products();
        await_products<0>();
        const float left = fast_exp2(decay * (kChunk * chunk));  // of the span's first state
        const float2 scales = reinterpret_cast<const float2*>(memory + S::kScales)[group % 2];
        const float scale[2] = {left * reciprocal(scales.x), left * reciprocal(scales.y)};
#pragma unroll
        for (int n = 0; n < kOutTiles; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) out[n][i] *= scale[n / S::kColumnTiles];
        begin_products();
#pragma unroll
        for (int k = 0; k < kChunk / 16; ++k)
            Wgmma<T, D / 2>::template shared<0, 1>(
                out, S::Tile::across(memory_at + tile(S::kKeys, chunk), kChunk, k),
                S::Tile::down(values(chunk), kChunk, 0, k), 1);
        end_products();
#pragma unroll 1
        for (int half = 0; half < 2 * chunk; ++half) {  // of the chunk before, whole
            const uint32_t rows = half * (kHalf * S::Tile::kRow);
            const uint32_t weighted = memory_at + tile(S::kWeighted, 0) + rows;
            uint32_t packed[kHalf / 8][2];
            float sum[kHalf / 8][4];
            begin_products();
#pragma unroll
            for (int k = 0; k < D / 16; ++k)
                Wgmma<T, kHalf>::template shared<0, 0>(sum, S::Tile::across(faded, kChunk, k),
                                                       S::Tile::across(weighted, kChunk, k), k > 0);
            end_products();
            await_products<0>();
#pragma unroll
            for (int n = 0; n < kHalf / 8; ++n) {
                packed[n][0] = pack<T>(sum[n][0], sum[n][1]);
                packed[n][1] = pack<T>(sum[n][2], sum[n][3]);
            }
            begin_products();
#pragma unroll
            for (int k = 0; k < kHalf / 16; ++k)
                Wgmma<T, D / 2>::template registers<1>(out, packed[2 * k][0], packed[2 * k][1], packed[2 * k + 1][0],
                                                       packed[2 * k + 1][1],
                                                       S::Tile::down(values(0) + rows, kChunk, 0, k), 1);
            end_products();
            await_products<0>();
        }
        await_products<0>();
    }
    // A chunk's values, from this group's half of the columns on.
    __device__ __forceinline__ uint32_t values(int chunk) const {
        return memory_at + tile(S::kValues, chunk) + group % 2 * (S::kTile / 2);
    }

    // part: also what `count` chunks add, whose tiles lie one after the other.
    __device__ __forceinline__ void add_chunks(int first_chunk, int count, int weighted, int values_at,
                                               Part<D>& part) const {
#pragma unroll 1
        for (int j = 0; j < count; ++j) {
            fade_part<D>(part, fast_exp2(decay * min(kChunk, at.length - first_token(first_chunk + j))));
            begin_products();
            add_rows<T, D, kChunk>(part, memory_at + tile(weighted, j), memory_at + tile(values_at, j), group);
            end_products();
            await_products<0>();
        }
    }

    // GroupNorm, gate and out.
    __device__ __forceinline__ void write(int span, const float (&out)[kOutTiles][4]) const {
        const int first = first_token(mine(span)), count = at.length - first, lane = opaque(lane_of());
        normalise<T, D>(p, out, at.first_head * D + group % 2 * (D / 2), memory + gates());
        __syncwarp();
        uint16_t* to = at.output + (first + 16 * warp_of() + lane / kOutTiles) * p.output_token_stride
                       + group % 2 * (D / 2) + lane % kOutTiles * 8;
        each_piece<D / 2>([&](uint32_t from, int row, int) {
            if (row < count) *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(memory + gates() + from);
            to += 32 / kOutTiles * p.output_token_stride;
        });
        __syncwarp();
    }
};

template <typename T, int D>
__device__ __forceinline__ void walk_pairs(const AttentionParams& p, const Cut& cut, const Place& at, char* memory,
                                           uint32_t memory_at) {
    using S = Span<D>;
    // The same in all lanes, and known to be: what follows is for the uniform units.
    const int group = __shfl_sync(~0u, threadIdx.x / kGroup, 0);
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    const int chunks = __shfl_sync(~0u, at.last_chunk - at.first_chunk, 0);
    const int segment = __shfl_sync(~0u, at.segment, 0);
    const bool followed = __shfl_sync(~0u, at.segment + 1 < at.segments, 0);
    const PairWalker<T, D> walker{p, at, memory, memory_at, group, chunks, at.decay[0]};
    const FeatureFinder<T, D> finder{p, at, memory, memory_at, group, at.decay[0]};
    const uint32_t finished = memory_at + S::kBarrier;  // a span's products, by all warps
    int turn = 0;  // spans so far, of both walks
    Part<D> part;  // times kStateUnit
    clear_part<D>(part);
    if (segment == 0) read_past<T, D>(p, at, group, part);
    if (followed) {
        const auto load_keys = [&](int chunk) {
            walker.load(walker.tile(S::kKeys, group), chunk, walker.column_of_keys());
        };
        const auto load_values = [&](int chunk) {
            walker.load(walker.tile(S::kValues, group), chunk, walker.column_of_values());
        };
        load_keys(group);
        load_values(group);
#pragma unroll 1
        for (int first = 0; first < chunks; first += kGroups, ++turn) {
            const int mine = first + group;
            wait_copies<1>();
            if (mine < chunks) {
                typename PairWalker<T, D>::Features packed;
                finder.find(walker.tile(S::kKeys, group), walker.first_token(mine), packed,
                            [&] { load_keys(mine + kGroups); });
                finder.weigh(walker.first_token(mine), true, packed);
                store_fragment<typename S::Tile>(memory_at + walker.tile(S::kQueries, group), packed);
            } else {
                commit_copies();
            }
            wait_copies<1>();  // values
            show_to_products();
            barrier_sync(kAll, kThreads);
            walker.add_chunks(first, min(kGroups, chunks - first), S::kQueries, S::kValues, part);
            warp_arrives(finished);
            await_phase(finished, turn & 1);
            load_values(mine + kGroups);
        }
        Exchange<D>(p, cut, at, group).publish(segment, part);
        if (segment == 0) read_past<T, D>(p, at, group, part);
    }
    walker.load_span(0);
    walker.load_gates(0);
    float scale = 1.0f;  // of the state's copy
    // Before anybody reads a span: the state's copy is there, and what all have made.
    const auto meet = [&](int span) {
        if (span == 0 && segment > 0)
            Exchange<D>(p, cut, at, group).collect(segment, fast_exp2(walker.decay * (cut.segment_chunks * kChunk)),
                                                   part);
        show_part<T, D>(part, scale, memory, memory_at, group);
        show_to_products();
        barrier_sync(kAll, kThreads);
        if (span == 0 && cut.segments > 1 && warp == 0) leave(p);
    };
#pragma unroll 1
    for (int span = 0; 2 * span < chunks; ++span, ++turn) {
        const int mine = walker.mine(span), pair = group / 2;
        if (mine < chunks) {
            {
                typename PairWalker<T, D>::Features packed;
                const bool queries = walker.of_queries();
                const int tile = walker.tile(queries ? S::kQueries : S::kKeys, pair), token = walker.first_token(mine);
                wait_copies<2>();
                finder.find(tile, token, packed, [] {});
                if (!queries) {
                    store_fragment<typename S::Tile>(memory_at + tile, packed);
                    show_to_products();
                    barrier_sync(kPairs + pair, 2 * kGroup);
                    finder.weigh(token, true, packed);
                    store_fragment<typename S::Tile>(memory_at + walker.tile(S::kWeighted, pair), packed);
                } else {
                    const uint32_t keys = memory_at + walker.tile(S::kKeys, pair);
                    uint32_t scores[kChunk / 8][2];
                    barrier_sync(kPairs + pair, 2 * kGroup);
                    find_scores<T, D>(packed, keys, walker.decay, scores);
                    finder.weigh(token, false, packed);
                    store_fragment<typename S::Tile>(memory_at + tile, packed);
                    barrier_sync(meeting_of(group), kGroup);  // nobody reads the keys any more
                    store_fragment<typename S::Tile>(keys, scores);
                }
            }
            wait_copies<0>();
            meet(span);
            float out[PairWalker<T, D>::kOutTiles][4];
            walker.read_span(span, part, out);
            walker.add_chunks(2 * span, min(2, chunks - 2 * span), S::kWeighted, S::kValues, part);
            warp_arrives(finished);
            await_phase(finished, turn & 1);
            walker.load_span(span + 1);
            __syncwarp();
            walker.write(span, out);
            walker.load_gates(span + 1);
        } else {  // the last span
            wait_copies<0>();
            meet(span);
            walker.add_chunks(2 * span, min(2, chunks - 2 * span), S::kWeighted, S::kValues, part);
            warp_arrives(finished);
        }
    }
    if (!followed) write_present<T, D>(p, at, group, part);
}

}  // namespace dijiang::prefill::hopper::spans
