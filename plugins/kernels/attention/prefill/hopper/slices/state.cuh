// The group that keeps the slice's state, transposed, [value, feature], in accumulators: it publishes a copy as T before
// each chunk, then adds the chunk. What segments tell each other of it.
#pragma once

#include "attention/prefill/hopper/slices/shape.cuh"
#include "attention/prefill/state_tile.cuh"

namespace dijiang::prefill::hopper::slices {

// Times kStateUnit. 64 values; columns in the order of feature_of, in halves: an instruction cannot have all of a state's
// registers where a thread begins with 128.
template <int D> using State = float[2][Slice<D>::kTiles / 2][4];

// Calls f(index of [feature, value], register) for what this lane holds.
template <int D, typename F> __device__ __forceinline__ void each_entry(State<D>& state, int slice, F&& f) {
    const int c = lane_of() % 4, first = opaque(slice * Slice<D>::kColumns + fragment_row() + feature_of(0, c, 0) * D);
    constexpr int kHalf = Slice<D>::kTiles / 2;
#pragma unroll
    for (int n = 0; n < Slice<D>::kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            f(first + feature_of(n, 0, i % 2) * D + i / 2 * 8, state[n / kHalf][n % kHalf][i]);
}

template <int D> __device__ __forceinline__ void store_slot(float* slot, const State<D>& state) {
    constexpr int kHalf = Slice<D>::kTiles / 2;
    slot += 4 * (threadIdx.x % kGroup);
#pragma unroll
    for (int n = 0; n < Slice<D>::kTiles; ++n) {
        const float(&x)[4] = state[n / kHalf][n % kHalf];
        *reinterpret_cast<float4*>(slot + n * (4 * kGroup)) = make_float4(x[0], x[1], x[2], x[3]);
    }
}
// What this very thread has stored there.
template <int D> __device__ __forceinline__ void load_slot(const float* slot, State<D>& state) {
    constexpr int kHalf = Slice<D>::kTiles / 2;
    slot += 4 * (threadIdx.x % kGroup);
#pragma unroll
    for (int n = 0; n < Slice<D>::kTiles; ++n) {
        const float4 x = *reinterpret_cast<const float4*>(slot + n * (4 * kGroup));
        float(&to)[4] = state[n / kHalf][n % kHalf];
        to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
    }
}

// A copy of the state times `scale`, as T, [value, feature]. Returns its largest magnitudes, of float16.
template <typename T, int D>
__device__ __forceinline__ uint32_t copy_state(const State<D>& state, float scale, uint32_t tile) {
    using S = Slice<D>;
    constexpr int kHalf = S::kTiles / 2;
    const int lane = opaque(lane_of());
    const uint32_t start = tile + (S::Tile::start(16 * warp_of() + lane % 16) ^ lane / 16 * 16);
    uint32_t most[4] = {};
#pragma unroll
    for (int n = 0; n < S::kTiles; n += 2) {
        uint32_t packed[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float(&from)[4] = state[n / kHalf][n % kHalf + i / 2];
            const float by = kUnit<T> != 1.0f ? scale : 1.0f;
            packed[i] = pack<T>(from[i % 2 * 2] * by, from[i % 2 * 2 + 1] * by);
            if (kUnit<T> != 1.0f) most[i] = larger(most[i], packed[i]);
        }
        stmatrix(S::Tile::piece(start, kChunk, n), packed[0], packed[1], packed[2], packed[3]);
    }
    return larger(larger(most[0], most[1]), larger(most[2], most[3]));
}

template <typename T, int D> struct StateKeeper {
    using S = Slice<D>;
    const Walk<D>& walk;

    __device__ __forceinline__ void read_past(State<D>& state) const {
        const AttentionParams& p = walk.p;
        const float* past = p.past_state + walk.at.row * p.past_batch_stride
                            + static_cast<int64_t>(walk.at.first_head) * D * D;
        each_entry<D>(state, walk.slice, [&](int i, float& x) { x = past[i] * kStateUnit<T>; });
    }
    __device__ __forceinline__ void write_present(State<D>& state) const {
        const AttentionParams& p = walk.p;
        float* present = p.present_state + walk.at.row * p.present_batch_stride
                         + static_cast<int64_t>(walk.at.first_head) * D * D;
        each_entry<D>(state, walk.slice, [&](int i, float& x) { present[i] = x * (1.0f / kStateUnit<T>); });
    }

    // The copy for a chunk's queries, in float16 with a scale that it can hold, which the others are told.
    __device__ __forceinline__ void show(const State<D>& state, float& scale, int chunk) const {
        await_phase(walk.barriers.state_empty(), chunk & 1 ^ 1);
        const uint32_t tile = walk.memory_at + S::kState;
        uint32_t most = copy_state<T, D>(state, scale, tile);
        if constexpr (kUnit<T> != 1.0f) {
            while (true) {  // rare: float16 could not hold the state
                const float2 largest = unpack<T>(most);
                const bool over = !(fmaxf(largest.x, largest.y) <= 65504.0f);
                // All know the same, and the compiler that they do.
                const bool again = any_of(kStateGroup, kGroup, over) && scale > 1e-30f;
                if (!__shfl_sync(~0u, again, 0)) break;
                scale *= 0.0625f;
                most = copy_state<T, D>(state, scale, tile);
            }
            if (threadIdx.x % kGroup == 0) *reinterpret_cast<float*>(walk.memory + S::kScale) = scale;
        }
        show_to_products();
        warp_arrives(walk.barriers.state_full(chunk % S::kOutputGroups));
    }

    // state: also what the i-th chunk of all that are walked adds. alone: nobody else reads its values.
    __device__ __forceinline__ void add(State<D>& state, int i, int chunk, bool alone) const {
        const SliceBarriers<D>& barriers = walk.barriers;
        const int stage = i % S::kStages, value_stage = i % S::kValueStages;
        scale_state(state, fast_exp2(walk.decay * min(kChunk, walk.left(chunk))));
        await_phase(barriers.values_full(value_stage), i / S::kValueStages & 1);
        await_phase(barriers.keys_full(stage), i / S::kStages & 1);
        const uint32_t keys = walk.memory_at + S::kKeys + stage * S::kTile;
        const uint32_t values = walk.memory_at + S::kValues + value_stage * S::kColumnTile;
        begin_products();
#pragma unroll
        for (int k = 0; k < kChunk / 16; ++k)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                Wgmma<T, D / 2>::template shared<1, 1>(state[half], S::Tile::down(values, kChunk, 0, k),
                                                       S::Tile::down(keys, kChunk, half * (D / 2), k), 1);
        end_products();
        await_products<0>();
        warp_arrives_everywhere<S::kBlocks>(barriers.keys_empty(stage));
        warp_arrives(barriers.values_empty(value_stage));
        if (alone) warp_arrives(barriers.values_empty(value_stage));
    }

    __device__ __forceinline__ void publish(const State<D>& state) const {
        store_slot<D>(walk.slot(walk.at.segment + 1), state);
        meet_async_reads();
        barrier_sync(kStateGroup, kGroup);  // the release is of all that came before, by whomever
        if (threadIdx.x % kGroup == 0) store_release(walk.flag(walk.at.segment), 1);
    }
    // state = what the segments before this one have left, as it comes through the queries' stages.
    __device__ __forceinline__ void join(State<D>& state) const {
        const float keep = fast_exp2(walk.decay * (walk.cut.segment_chunks * kChunk));
        clear_state(state);
#pragma unroll 1
        for (int segment = 0; segment < walk.at.segment; ++segment)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                await_phase(walk.barriers.queries_full(half), segment & 1);
                const char* part = walk.memory + S::kQueries + half * S::kQueryStage + threadIdx.x % kGroup * 16;
#pragma unroll
                for (int n = 0; n < S::kPartTiles; ++n) {
                    const float4 x = *reinterpret_cast<const float4*>(part + n * (16 * kGroup));
                    float(&to)[4] = state[half][n];
                    to[0] = fmaf(to[0], keep, x.x), to[1] = fmaf(to[1], keep, x.y);
                    to[2] = fmaf(to[2], keep, x.z), to[3] = fmaf(to[3], keep, x.w);
                }
                warp_arrives_everywhere<S::kBlocks>(walk.barriers.queries_empty(half));
            }
    }
};

template <typename T, int D> __device__ __forceinline__ void keep_state(const Walk<D>& walk) {
    const StateKeeper<T, D> keeper{walk};
    const int chunks = walk.chunks, before = walk.chunks_before();
    const bool cut = walk.cut.segments > 1;
    State<D> state;
    if (walk.at.segment == 0) {
        keeper.read_past(state);
        if (walk.followed) store_slot<D>(walk.slot(0), state);  // present may be the same memory
    } else {
        clear_state(state);
    }
    if (walk.followed) {
#pragma unroll 1
        for (int chunk = 0; chunk < chunks; ++chunk) keeper.add(state, chunk, chunk, true);
        keeper.publish(state);
        if (walk.at.segment == 0) load_slot<D>(walk.slot(0), state);
    }
    if (cut) {
        if (walk.at.segment > 0) keeper.join(state);
        if (threadIdx.x % kGroup < 32) leave(walk.p, 1);
    }
    float scale = 1.0f;  // of the copies
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
        keeper.show(state, scale, chunk);
        keeper.add(state, before + chunk, chunk, false);
    }
    if (!walk.followed) keeper.write_present(state);
}

}  // namespace dijiang::prefill::hopper::slices
