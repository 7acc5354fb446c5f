// A block's walk over its spans.
//
// Each group of four warps takes one chunk of a span: its features of keys and queries, its outputs. What chunks of a
// span are to each other goes through products of weighted features, as with the state; the state is there once per
// span, and each group keeps some of its columns. All groups do the same at about the same time.
#pragma once

#include "attention/prefill/hopper/norm.cuh"
#include "attention/prefill/hopper/scores.cuh"
#include "attention/prefill/hopper/spans/features.cuh"
#include "attention/prefill/hopper/spans/state.cuh"

namespace dijiang::prefill::hopper::spans {

template <typename T, int D> struct Walker {
    using S = Span<D>;
    using Features = uint32_t[S::kTiles][2];
    static constexpr int kHalf = kChunk / 2;
    const AttentionParams& p;
    const Place& at;
    char* memory;
    uint32_t memory_at;
    int group, chunks;  // of the segment
    float decay;

    __device__ __forceinline__ bool has(int span) const { return span * kGroups + group < chunks; }
    __device__ __forceinline__ int first_token(int span) const {
        return (at.first_chunk + span * kGroups + group) * kChunk;
    }
    __device__ __forceinline__ int keys() const { return S::kKeys + group * S::kTile; }
    __device__ __forceinline__ int queries() const { return S::kQueries + group * S::kTile; }
    __device__ __forceinline__ int gates() const { return S::kGates + group * S::kTile; }
    __device__ __forceinline__ int weighted(int chunk) const { return S::kWeighted + chunk * S::kTile; }
    __device__ __forceinline__ int values(int span, int chunk) const {
        return S::kValues + (span % 2 * kGroups + chunk) * S::kTile;
    }

    // This group's chunk of a span, if there is one, to a tile. One batch of copies either way.
    __device__ __forceinline__ void load(int tile, int span, const uint16_t* row, int64_t stride) const {
        if (has(span))
            load_rows<D>(memory_at + tile, row + first_token(span) * stride, stride, at.length - first_token(span));
        else
            commit_copies();
    }
    __device__ __forceinline__ void load_keys(int span) const {
        load(keys(), span, at.qkv + (p.num_heads + at.kv_head[0]) * D, p.qkv_token_stride);
    }
    __device__ __forceinline__ void load_values(int span) const {
        load(values(span, group), span, at.qkv + (p.num_heads + p.num_kv_heads + at.kv_head[0]) * D,
             p.qkv_token_stride);
    }
    __device__ __forceinline__ void load_queries(int span) const {
        load(queries(), span, at.qkv + at.first_head * D, p.qkv_token_stride);
    }
    __device__ __forceinline__ void load_gates(int span) const { load(gates(), span, at.gate, p.gate_token_stride); }

    __device__ __forceinline__ void store_keys(const Features& packed) const {
        store_fragment<typename S::Tile>(memory_at + keys(), packed);
    }
    __device__ __forceinline__ void store_weighted(const Features& packed) const {
        store_fragment<typename S::Tile>(memory_at + weighted(group), packed);
    }

    // What a span leaves of the state.
    __device__ __forceinline__ float keep(int span, int chunk) const {
        const int first = (at.first_chunk + span * kGroups + chunk) * kChunk;
        return fast_exp2(decay * min(kChunk, at.length - first));
    }
    __device__ __forceinline__ int chunks_of(int span) const { return min(kGroups, chunks - span * kGroups); }

    // part: also what the span's chunks from `first` on add. Done when this returns.
    __device__ __forceinline__ void add_chunks(int span, int first, Part<D>& part) const {
#pragma unroll 1
        for (int j = first; j < chunks_of(span); ++j) {
            fade_part<D>(part, keep(span, j));
            begin_products();
            add_rows<T, D, kChunk>(part, memory_at + weighted(j), memory_at + values(span, j), group);
            end_products();
            await_products<0>();
        }
    }

    // Outputs of this group's chunk from its faded queries and scores. part: also what the chunks before it add.
    __device__ __forceinline__ void read_span(int span, const Features& faded, const uint32_t (&scores)[kChunk / 8][2],
                                              Part<D>& part, float (&out)[S::kTiles][4]) const {
        const uint32_t state = memory_at + S::kState;
        begin_products();
#pragma unroll
        for (int k = 0; k < D / 16; ++k)
            Wgmma<T, D>::template registers<1>(out, faded[2 * k][0], faded[2 * k][1], faded[2 * k + 1][0],
                                               faded[2 * k + 1][1], S::Tile::down(state, D, 0, k),
                                               k > 0);
        end_products();
        await_products<0>();
        const float left = fast_exp2(decay * (kChunk * group));  // of the span's first state
        float scale[kGroups] = {left, left, left, left};
        if constexpr (kUnit<T> != 1.0f) {
            const float4 of_copy = *reinterpret_cast<const float4*>(memory + S::kScales);
            scale[0] *= reciprocal(of_copy.x), scale[1] *= reciprocal(of_copy.y);
            scale[2] *= reciprocal(of_copy.z), scale[3] *= reciprocal(of_copy.w);
        }
#pragma unroll
        for (int n = 0; n < S::kTiles; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) out[n][i] *= scale[n / S::kPieces];
        begin_products();
        add_values(scores, memory_at + values(span, group), out);
        end_products();
        await_products<0>();  // few registers are left: nothing else while these are read, here and below
#pragma unroll 1
        for (int half = 0; half < 2 * group; ++half) {  // of a chunk before: more would not fit in registers
            const int j = half / 2;
            const uint32_t rows = half % 2 * (kHalf * S::Tile::kRow);
            uint32_t packed[kHalf / 8][2];
            float sum[kHalf / 8][4];
            const uint32_t from = memory_at + weighted(j) + rows, value = memory_at + values(span, j) + rows;
            if (half % 2 == 0) fade_part<D>(part, keep(span, j));
            begin_products();
#pragma unroll
            for (int k = 0; k < D / 16; ++k)
                Wgmma<T, kHalf>::template registers<0>(sum, faded[2 * k][0], faded[2 * k][1], faded[2 * k + 1][0],
                                                       faded[2 * k + 1][1], S::Tile::across(from, kChunk, k), k > 0);
            add_rows<T, D, kHalf>(part, from, value, group);
            end_products();
            await_products<0>();
            const float further = fast_exp2(decay * (kChunk * (group - 1 - j)));
#pragma unroll
            for (int n = 0; n < kHalf / 8; ++n) {
                packed[n][0] = pack<T>(sum[n][0] * further, sum[n][1] * further);
                packed[n][1] = pack<T>(sum[n][2] * further, sum[n][3] * further);
            }
            begin_products();
            add_values(packed, value, out);
            end_products();
            await_products<0>();
        }
    }

    // out += scores of kTokens / 8 tiles of columns with as many values.
    template <int N>
    __device__ __forceinline__ void add_values(const uint32_t (&scores)[N][2], uint32_t values,
                                               float (&out)[S::kTiles][4]) const {
#pragma unroll
        for (int k = 0; k < N / 2; ++k)
            Wgmma<T, D>::template registers<1>(out, scores[2 * k][0], scores[2 * k][1], scores[2 * k + 1][0],
                                               scores[2 * k + 1][1], S::Tile::down(values, kChunk, 0, k), 1);
    }

    // GroupNorm, gate and out.
    __device__ __forceinline__ void write(int span, const float (&out)[S::kTiles][4]) const {
        normalise<T, D>(p, out, at.first_head * D, memory + gates());
        __syncwarp();
        const int count = at.length - first_token(span);
        const int lane = opaque(lane_of());
        uint16_t* to = at.output + (first_token(span) + 16 * warp_of() + lane / S::kTiles) * p.output_token_stride
                       + lane % S::kTiles * 8;
        each_piece<D>([&](uint32_t from, int row, int) {
            if (row < count) *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(memory + gates() + from);
            to += 32 / S::kTiles * p.output_token_stride;
        });
        __syncwarp();
    }
};

template <typename T, int D>
__device__ __forceinline__ void walk_spans(const AttentionParams& p, const Cut& cut, const Place& shared_place,
                                           char* memory, uint32_t memory_at) {
    using S = Span<D>;
    // The same in all lanes, and known to be: what follows is for the uniform units.
    const int group = __shfl_sync(~0u, threadIdx.x / kGroup, 0);
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    Place at = shared_place;
    at.first_chunk = __shfl_sync(~0u, at.first_chunk, 0);
    at.length = __shfl_sync(~0u, at.length, 0);
    at.position = __shfl_sync(~0u, at.position, 0);
    const int chunks = __shfl_sync(~0u, at.last_chunk - at.first_chunk, 0);
    const int segment = __shfl_sync(~0u, at.segment, 0);
    const bool followed = __shfl_sync(~0u, at.segment + 1 < at.segments, 0), single = chunks <= kGroups;
    const int spans = (chunks + kGroups - 1) / kGroups;
    const int leaving = chunks < kGroups ? kThreads / 32 - 1 : 0;  // a warp that has little to do
    const Walker<T, D> walker{p, at, memory, memory_at, group, chunks, at.decay[0]};
    const FeatureFinder<T, D> finder{p, at, memory, memory_at, group, at.decay[0]};
    const uint32_t shown = memory_at + S::kShown, finished = memory_at + S::kFinished;
    int turn = 0;  // spans so far, of both walks

    // Batches of copies in this order: keys, values, queries, gates.
    walker.load_keys(0);
    walker.load_values(0);
    if (single || !followed) walker.load_queries(0), walker.load_gates(0);
    Part<D> part;  // times kStateUnit
    clear_part<D>(part);
    if (segment == 0) read_past<T, D>(p, at, group, part);
    if (followed) {
        Part<D> sum;
#pragma unroll
        for (int n = 0; n < S::kPieces; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[n][i] = part[n][i];
#pragma unroll 1
        for (int span = 0; span < spans; ++span, ++turn) {
            if (single)
                wait_copies<3>();
            else
                wait_copies<1>();
            if (walker.has(span)) {
                typename Walker<T, D>::Features packed;
                finder.find(walker.keys(), walker.first_token(span), packed, [&] {
                    if (!single) walker.load_keys(span + 1);
                });
                if (single) walker.store_keys(packed);
                finder.weigh(walker.first_token(span), true, packed);
                await_phase(finished, turn & 1 ^ 1);
                walker.store_weighted(packed);
            } else {
                if (!single) commit_copies();
                await_phase(finished, turn & 1 ^ 1);
            }
            if (!single) walker.load_values(span + 1);
            wait_copies<2>();  // this span's values are there
            show_to_products();
            warp_arrives(shown);
            await_phase(shown, turn & 1);
            walker.add_chunks(span, 0, sum);
            if (!single) warp_arrives(finished);  // else nothing of it is written anew
        }
        Exchange<D>(p, cut, at, group).publish(segment, sum);
        if (!single) {
            await_phase(finished, turn & 1 ^ 1);
            walker.load_keys(0);
            walker.load_values(0);
            walker.load_queries(0);
            walker.load_gates(0);
        }
    }
    float scale = 1.0f;  // of the state's copy
    uint32_t before = 0;  // how many blocks have left
    const bool known = single && followed;  // the keys: from the first walk
    // Before anybody reads a span: the state's copy is there, and what all have made.
    const auto meet = [&](int span) {
        if (span == 0 && segment > 0)
            Exchange<D>(p, cut, at, group).collect(segment, fast_exp2(walker.decay * (cut.segment_chunks * kChunk)),
                                                   part);
        show_part<T, D>(part, scale, memory, memory_at, group);
        show_to_products();
        warp_arrives(shown);
        await_phase(shown, turn & 1);
        if (span == 0 && cut.segments > 1 && warp == leaving && lane_of() == 0) before = atomicAdd(p.sync + 1, 1u);
    };
#pragma unroll 1
    for (int span = 0; span < spans; ++span, ++turn) {
        // What a branch makes ends with it, or the compiler would keep room for it in the other one.
        if (walker.has(span)) {
            typename Walker<T, D>::Features packed;
            if (span == 0)
                wait_copies<3>();
            else
                wait_copies<1>();
            if (known) walker.load_values(span + 1), wait_copies<2>();
#pragma unroll 1
            for (int queries = known; queries < 2; ++queries) {  // keys, then queries: the same code
                const int tile = queries ? walker.queries() : walker.keys();
                finder.find(tile, walker.first_token(span), packed, [&] {
                    if (queries) walker.load_queries(span + 1);
                });
                if (!queries) {
                    walker.store_keys(packed);
                    finder.weigh(walker.first_token(span), true, packed);
                    await_phase(finished, turn & 1 ^ 1);
                    walker.store_weighted(packed);
                    walker.load_values(span + 1);
                    wait_copies<2>();
                }
            }
            uint32_t scores[kChunk / 8][2];
            find_scores<T, D>(packed, memory_at + walker.keys(), walker.decay, scores);
            barrier_sync(meeting_of(group), kGroup);
            walker.load_keys(span + 1);
            finder.weigh(walker.first_token(span), false, packed);
            meet(span);
            float out[S::kTiles][4];
            walker.read_span(span, packed, scores, part, out);
            walker.add_chunks(span, group, part);
            warp_arrives(finished);
            wait_copies<3>();  // gates
            __syncwarp();
            walker.write(span, out);
            walker.load_gates(span + 1);
        } else {  // the last span
            wait_copies<0>();
            if (!known) await_phase(finished, turn & 1 ^ 1);
            meet(span);
            walker.add_chunks(span, 0, part);
            warp_arrives(finished);
        }
    }
    if (!followed) write_present<T, D>(p, at, group, part);
    if (cut.segments > 1 && warp == leaving) clear_if_last(p, before, kGroups);
}

}  // namespace dijiang::prefill::hopper::spans
