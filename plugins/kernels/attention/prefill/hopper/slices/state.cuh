// The group that keeps the slice's state, transposed, [value, feature], in accumulators. Packed as T, these are the
// left operand of outputs, [value, token]: the state never leaves its registers. What segments tell each other of it.
#pragma once

#include "attention/prefill/hopper/slices/shape.cuh"
#include "attention/prefill/state_tile.cuh"

namespace dijiang::prefill::hopper::slices {

// Times kStateUnit. 64 values; columns in the order of feature_of, in halves, which products take in turn.
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

// Half a state times `scale`, as T: rows of a product's left operand. Returns its largest magnitudes, of float16.
template <typename T, bool kScaled, int N>
__device__ __forceinline__ uint32_t pack_half(const float (&half)[N][4], float scale, uint32_t (&packed)[N][2]) {
    uint32_t most = 0;
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float a = half[n][2 * i], b = half[n][2 * i + 1];
            packed[n][i] = kScaled ? pack<T>(a * scale, b * scale) : pack<T>(a, b);
            if (kUnit<T> != 1.0f) most = larger(most, packed[n][i]);
        }
    return most;
}

template <typename T, int D> struct StateKeeper {
    using S = Slice<D>;
    using Half = float[S::kTiles / 2][4];
    using Packed = uint32_t[S::kTiles / 2][2];
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

    // `half` as T for products. float16: times a scale that lets it hold all of the warp's values, which are the rows
    // of its outputs too; `scale` may become smaller in the first half.
    __device__ __forceinline__ void show(const State<D>& state, int half, float& scale, Packed& packed) const {
        if constexpr (kUnit<T> == 1.0f) {
            pack_half<T, false>(state[half], scale, packed);
        } else if (half == 1) {
            if (scale == 1.0f)
                pack_half<T, false>(state[half], scale, packed);
            else
                pack_half<T, true>(state[half], scale, packed);
        } else {
            Packed other;
            uint32_t most = scale == 1.0f ? larger(pack_half<T, false>(state[1], scale, other),
                                                   pack_half<T, false>(state[0], scale, packed))
                                          : larger(pack_half<T, true>(state[1], scale, other),
                                                   pack_half<T, true>(state[0], scale, packed));
            while (true) {  // rare: float16 could not hold the state
                const float2 largest = unpack<T>(most);
                const bool over = !(fmaxf(largest.x, largest.y) <= 65504.0f);
                if (__ballot_sync(~0u, over) == 0 || scale < 1e-30f) break;
                scale *= 0.0625f;
                most = larger(pack_half<T, true>(state[1], scale, other),
                              pack_half<T, true>(state[0], scale, packed));
            }
        }
    }

    __device__ __forceinline__ uint32_t keys(int i) const {
        return walk.operands() + S::kKeys + i % S::kKeyStages * S::kTile;
    }
    __device__ __forceinline__ uint32_t values(int i) const {
        return walk.operands() + S::kValues + i % S::kValueStages * S::kColumnTile;
    }
    __device__ __forceinline__ void await_keys(int i) const {
        await_phase(walk.barriers.keys_full(i % S::kKeyStages), i / S::kKeyStages & 1);
    }
    __device__ __forceinline__ void await_values(int i) const {
        await_phase(walk.barriers.values_full(i % S::kValueStages), i / S::kValueStages & 1);
    }
    __device__ __forceinline__ void leave_keys_and_values(int i) const {
        warp_arrives_everywhere<S::kBlocks>(walk.barriers.keys_empty(i % S::kKeyStages));
        warp_arrives(walk.barriers.values_empty(i % S::kValueStages));
    }
    __device__ __forceinline__ float keep(int chunk) const {
        return fast_exp2(walk.decay * min(kChunk, walk.left(chunk)));
    }

    // Half the state's features: also what the i-th chunk of all that are walked adds. Products of a batch.
    __device__ __forceinline__ void add(Half& state, int half, int i) const {
#pragma unroll
        for (int k = 0; k < kChunk / 16; ++k)
            Wgmma<T, D / 2>::template shared<1, 1>(state, S::Tile::down(values(i), kChunk, 0, k),
                                                   S::Tile::down(keys(i), kChunk, half * (D / 2), k), 1);
    }

    // out [value, token] += half the state's features and the queries'. Products of a batch.
    __device__ __forceinline__ void read(const Packed& packed, int half, uint32_t queries,
                                         float (&out)[kChunk / 8][4]) const {
#pragma unroll
        for (int k = 0; k < D / 32; ++k)
            Wgmma<T, kChunk>::template registers<0>(out, packed[2 * k][0], packed[2 * k][1], packed[2 * k + 1][0],
                                                    packed[2 * k + 1][1],
                                                    S::Tile::across(queries, kChunk, half * (D / 32) + k), 1);
    }

    // A chunk of the last walk: its outputs, for the other group, and what it adds. While one half's products run, the
    // other half is made ready.
    __device__ __forceinline__ void step(State<D>& state, float& scale, int chunk) const {
        const int i = walk.chunks_before() + chunk, stage = chunk % S::kQueryStages;
        const uint32_t queries = walk.operands() + S::kQueries + stage * S::kQueryStage, scores = queries + S::kTile;
        const float fade = keep(chunk);
        float out[kChunk / 8][4];
        Packed packed;
        await_values(i);
        await_phase(walk.barriers.queries_full(stage), (walk.parts() + chunk) / S::kQueryStages & 1);
        begin_products();
#pragma unroll
        for (int k = 0; k < kChunk / 16; ++k)
            Wgmma<T, kChunk>::template shared<1, 0>(out, S::Tile::down(values(i), kChunk, 0, k),
                                                    S::Tile::across(scores, kChunk, k), k > 0);
        end_products();
        show(state, 0, scale, packed);
        if constexpr (kUnit<T> != 1.0f) {
            await_products<0>();
            if (scale != 1.0f) times(scale, out);  // rare
        }
        begin_products();
        read(packed, 0, queries, out);
        end_products();
        times(fade, state[0]);
        await_keys(i);
        begin_products();
        add(state[0], 0, i);
        end_products();
        await_products<1>();
        show(state, 1, scale, packed);
        begin_products();
        read(packed, 1, queries, out);
        end_products();
        times(fade, state[1]);
        begin_products();
        add(state[1], 1, i);
        end_products();
        await_products<1>();
        warp_arrives_everywhere<S::kBlocks>(walk.barriers.queries_empty(stage));
        if (kUnit<T> != 1.0f && scale != 1.0f) times(1.0f / scale, out);
        hand_over(out, chunk);
        await_products<0>();
        leave_keys_and_values(i);
    }
    template <int N> static __device__ __forceinline__ void times(float factor, float (&x)[N][4]) {
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j) x[n][j] *= factor;
    }
    // [value, token] in registers to [token, value] in shared memory.
    __device__ __forceinline__ void hand_over(const float (&out)[kChunk / 8][4], int chunk) const {
        await_phase(walk.barriers.outputs_empty(), chunk & 1 ^ 1);
        float* to =
            reinterpret_cast<float*>(walk.memory + S::kOuts) + fragment_column() * S::kOutPitch + fragment_row();
#pragma unroll
        for (int n = 0; n < kChunk / 8; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j) to[(8 * n + j % 2) * S::kOutPitch + j / 2 * 8] = out[n][j];
        warp_arrives(walk.barriers.outputs_full());
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
                for (int n = 0; n < S::kTiles / 2; ++n) {
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
    const int chunks = walk.chunks;
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
        for (int chunk = 0; chunk < chunks; ++chunk) {
            scale_state(state, keeper.keep(chunk));
            keeper.await_values(chunk);
            keeper.await_keys(chunk);
            begin_products();
            keeper.add(state[0], 0, chunk);
            keeper.add(state[1], 1, chunk);
            end_products();
            await_products<0>();
            keeper.leave_keys_and_values(chunk);
        }
        keeper.publish(state);
        if (walk.at.segment == 0) load_slot<D>(walk.slot(0), state);
    }
    if (cut) {
        if (walk.at.segment > 0) keeper.join(state);
        if (threadIdx.x % kGroup < 32) leave(walk.p, 1);
    }
    float scale = 1.0f;  // of the state as T
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) keeper.step(state, scale, chunk);
    if (!walk.followed) keeper.write_present(state);
}

}  // namespace dijiang::prefill::hopper::slices
