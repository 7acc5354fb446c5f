// The group that keeps the states, [feature, value], in accumulators: it publishes a copy as T before each chunk, then
// adds the chunk.
#pragma once

#include "attention/prefill/hopper/features.cuh"
#include "attention/prefill/state_tile.cuh"

namespace dijiang::prefill::hopper {

template <int D> using StateTile = float[Shape<D>::kStateTiles][D / 8][4];

// Does this warp hold features of tile m?
template <int D> __device__ __forceinline__ bool holds(int m) { return 64 * m + 16 * warp_of() < D; }

// Calls f(index of [feature, value], two registers) for what this lane holds of a head's state.
template <int D, typename F> __device__ __forceinline__ void each_pair(StateTile<D>& state, F&& f) {
#pragma unroll
    for (int m = 0; m < Shape<D>::kStateTiles; ++m)
        if (holds<D>(m)) {
            const int first = opaque((64 * m + fragment_row()) * D + fragment_column());
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
                f(first + 8 * n, state[m][n][0], state[m][n][1]);
                f(first + 8 * D + 8 * n, state[m][n][2], state[m][n][3]);
            }
        }
}

// Where the segments of a job meet. Slot 0 keeps the past (present may be the same memory), slot i + 1 what segment
// i adds.
template <int D> struct Exchange {
    static constexpr int kFloats = Shape<D>::kStateTiles * D / 8 * 4 * kGroup;  // of a head
    float* slots;
    unsigned* flags;
    __device__ __forceinline__ Exchange(const AttentionParams& p, const Cut& cut, const Place& at)
        : slots(cut.states + static_cast<int64_t>(at.job) * cut.segments * (Shape<D>::kHeads * kFloats)),
          flags(p.sync + 2 + at.job * cut.segments) {}
    __device__ __forceinline__ float* slot(int i, int head) const {
        return slots + static_cast<int64_t>(i * Shape<D>::kHeads + head) * kFloats + 4 * (threadIdx.x % kGroup);
    }
};

template <int D> __device__ __forceinline__ void store_slot(float* slot, const StateTile<D>& state) {
#pragma unroll
    for (int m = 0; m < Shape<D>::kStateTiles; ++m)
        if (holds<D>(m)) {
#pragma unroll
            for (int n = 0; n < D / 8; ++n)
                *reinterpret_cast<float4*>(slot + (m * (D / 8) + n) * (4 * kGroup)) =
                    make_float4(state[m][n][0], state[m][n][1], state[m][n][2], state[m][n][3]);
        }
}

// A slot's part: half the columns of a tile of features.
template <int D> struct SlotPart {
    static constexpr int kTiles = D / 16, kBytes = kTiles * 16 * kGroup;
    static_assert(2 * kBytes <= Shape<D>::kStateStages * Shape<D>::kMatrix);

    // To shared memory, past the first-level cache: another block may have written it. Each thread brings what it will
    // read itself.
    static __device__ __forceinline__ void fetch(const float* slot, int m, int half, uint32_t to) {
        if (holds<D>(m)) {
            slot += (m * (D / 8) + half * kTiles) * (4 * kGroup);
#pragma unroll
            for (int n = 0; n < kTiles; ++n) copy_async(to + n * (16 * kGroup), slot + n * (4 * kGroup), true);
        }
        commit_copies();
    }
    // state = state keep + part.
    static __device__ __forceinline__ void add(const char* part, float keep, float (&state)[D / 8][4], int m,
                                               int half) {
        if (!holds<D>(m)) return;
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
            float(&to)[4] = state[half * kTiles + i];
            const float4 x = *reinterpret_cast<const float4*>(part + i * (16 * kGroup));
            to[0] = fmaf(to[0], keep, x.x), to[1] = fmaf(to[1], keep, x.y);
            to[2] = fmaf(to[2], keep, x.z), to[3] = fmaf(to[3], keep, x.w);
        }
    }
};

// A copy of the state times `scale`, as T, to a tile. Returns its largest magnitudes, of float16.
template <typename T, int D, bool kScaled>
__device__ __forceinline__ uint32_t copy_state(const StateTile<D>& state, float scale, uint32_t tile) {
    using S = Shape<D>;
    const int lane = opaque(lane_of());
    uint32_t most[4] = {};
#pragma unroll
    for (int m = 0; m < S::kStateTiles; ++m)
        if (holds<D>(m)) {
            const uint32_t start = tile + (S::Tile::start(64 * m + 16 * warp_of() + lane % 16) ^ lane / 16 * 16);
#pragma unroll
            for (int n = 0; n < S::kTiles; n += 2) {
                uint32_t packed[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float a = state[m][n + i / 2][i % 2 * 2], b = state[m][n + i / 2][i % 2 * 2 + 1];
                    packed[i] = kScaled ? pack<T>(a * scale, b * scale) : pack<T>(a, b);
                    if (kUnit<T> != 1.0f) most[i] = larger(most[i], packed[i]);
                }
                stmatrix(S::Tile::piece(start, D, n), packed[0], packed[1], packed[2], packed[3]);
            }
        }
    return larger(larger(most[0], most[1]), larger(most[2], most[3]));
}

// A warp: until `count` flags, at most 32, are raised.
__device__ __forceinline__ void await_flags(const unsigned* flags, int count) {
    if (lane_of() < count)
        while (!load_acquire(flags + lane_of())) __nanosleep(40);
    __syncwarp();
}

// state = the past and what the segments before this one have added to it. Two parts of a slot are under way at a
// time, where copies of states will be.
template <int D>
__device__ __forceinline__ void join_segments(const Cut& cut, const Place& at, const Exchange<D>& exchange,
                                              char* memory, uint32_t memory_at,
                                              StateTile<D> (&state)[Shape<D>::kHeads]) {
    using S = Shape<D>;
    using Part = SlotPart<D>;
    constexpr int H = S::kHeads, kParts = 2 * S::kStateTiles * H;
    const int mine = S::kStates + threadIdx.x % kGroup * 16, slots = max(1, at.segment);
    const int tokens = cut.segment_chunks * kChunk;  // of every segment but the last
    const auto fetch = [&](int i, int part) {
        const int h = part / (2 * S::kStateTiles), m = part / 2 % S::kStateTiles;
        Part::fetch(exchange.slot(at.segment == 0 ? 0 : i + 1, h), m, part % 2,
                    memory_at + mine + part % 2 * Part::kBytes);
    };
#pragma unroll
    for (int h = 0; h < H; ++h) clear_state(state[h]);
    await_flags(exchange.flags, at.segment);
    fetch(0, 0);
#pragma unroll 1
    for (int i = 0; i < slots; ++i) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
            const int h = part / (2 * S::kStateTiles), m = part / 2 % S::kStateTiles;
            if (part + 1 < kParts) {
                fetch(i, part + 1);
            } else if (i + 1 < slots) {
                fetch(i + 1, 0);
            } else {
                commit_copies();
            }
            wait_copies<1>();
            Part::add(memory + mine + part % 2 * Part::kBytes, fast_exp2(at.decay[h] * tokens), state[h][m], m,
                      part % 2);
        }
    }
    barrier_sync(kStateGroup, kGroup);
}

template <typename T, int D>
__device__ __forceinline__ void keep_states(const AttentionParams& p, const Cut& cut, const Place& at, char* memory,
                                            uint32_t memory_at) {
    using S = Shape<D>;
    constexpr int H = S::kHeads;
    constexpr bool kHalf = kUnit<T> != 1.0f;  // float16: mind its range
    const Barriers<D> barriers{memory_at + S::kBarriers};
    const int chunks = at.last_chunk - at.first_chunk, items = chunks * H;
    const int walks = at.segment + 1 < at.segments ? 2 : 1;
    const auto load_values = [&](int item) {
        const int chunk = at.first_chunk + item / H;
        const int column = (p.num_heads + p.num_kv_heads + at.kv_head[item % H]) * D;
        load_rows<D>(memory_at + S::kValues + item % S::kValueStages * S::kTile,
                     at.qkv + static_cast<int64_t>(chunk) * kChunk * p.qkv_token_stride + column, p.qkv_token_stride,
                     at.length - chunk * kChunk);
    };
    StateTile<D> state[H];  // times kStateUnit
    float scale = 1.0f;     // of the copies
    const Exchange<D> exchange(p, cut, at);
#pragma unroll
    for (int h = 0; h < H; ++h) {
        clear_state(state[h]);
        if (at.segment == 0) {
            const float* past = p.past_state + at.row * p.past_batch_stride
                                + static_cast<int64_t>(at.first_head + h) * D * D;
            each_pair<D>(state[h], [&](int i, float& x, float& y) {
                const float2 both = *reinterpret_cast<const float2*>(past + i);
                x = both.x * kStateUnit<T>, y = both.y * kStateUnit<T>;
            });
            if (at.segments > 1) store_slot<D>(exchange.slot(0, h), state[h]);
        }
    }
    int taken = 0;  // of the first group's weighted tiles
    for (int walk = 3 - walks; walk <= 2; ++walk) {
        const bool full = walk == 2;
        load_values(0);
        if (full && at.segments > 1) {
            join_segments<D>(cut, at, exchange, memory, memory_at, state);
        }
        for (int chunk = 0; chunk < chunks; ++chunk) {
#pragma unroll
            for (int h = 0; h < H; ++h) {
                const int item = chunk * H + h, stage = item % S::kStateStages;
                if (full) {
                    await_phase(barriers.state_empty(stage), item / S::kStateStages & 1 ^ 1);
                    const uint32_t copy = memory_at + S::kStates + stage * S::kMatrix;
                    uint32_t most = scale == 1.0f ? copy_state<T, D, false>(state[h], scale, copy)
                                                  : copy_state<T, D, true>(state[h], scale, copy);
                    if (kHalf) {
                        while (true) {  // rare: float16 could not hold the state
                            const float2 largest = unpack<T>(most);
                            const bool over = !(fmaxf(largest.x, largest.y) <= 65504.0f);
                            if (!any_of(kStateGroup, kGroup, over) || scale < 1e-30f) break;
                            scale *= 0.0625f;
                            most = copy_state<T, D, true>(state[h], scale, copy);
                        }
                        if (threadIdx.x % kGroup == 0) reinterpret_cast<float*>(memory + S::kScales)[stage] = scale;
                    }
                }
                wait_copies<0>();
                show_to_products();
                if (full) warp_arrives(barriers.state_full(stage));
                barrier_sync(kStateGroup, kGroup);
                if (item + 1 < items) load_values(item + 1);
                const int tokens = min(kChunk, at.length - (at.first_chunk + chunk) * kChunk);
                scale_state(state[h], fast_exp2(at.decay[h] * tokens));
                // In the first walk two groups take turns.
                const int group = full ? 0 : H == 2 ? h : item % 2;
                // Opaque, or its descriptors would be kept in registers that the states of two heads need.
                const uint32_t weighted = static_cast<uint32_t>(
                    opaque(static_cast<int>(memory_at) + (group == 0 ? S::kWeighted : S::kKeys)));
                await_phase(barriers.weighted_full(group), group == 0 ? taken & 1 : item / 2 & 1);
                if (group == 0) ++taken;
                begin_products();
#pragma unroll
                for (int k = 0; k < kChunk / 16; ++k)
#pragma unroll
                    for (int m = 0; m < S::kStateTiles; ++m)
                        Wgmma<T, D>::template shared<1, 1>(
                            state[h][m], S::Tile::down(weighted, kChunk, 64 * m, k),
                            S::Tile::down(memory_at + S::kValues + item % S::kValueStages * S::kTile, kChunk, 0, k),
                            1);
                end_products();
                await_products<0>();
                warp_arrives(barriers.weighted_empty(group));
            }
        }
        if (!full) {
#pragma unroll
            for (int h = 0; h < H; ++h) store_slot<D>(exchange.slot(at.segment + 1, h), state[h]);
            barrier_sync(kStateGroup, kGroup);  // the release is of all that came before, by whomever
            if (threadIdx.x % kGroup == 0) store_release(exchange.flags + at.segment, 1);
        }
    }
    if (at.segment == at.segments - 1) {
#pragma unroll
        for (int h = 0; h < H; ++h) {
            float* present = p.present_state + at.row * p.present_batch_stride
                             + static_cast<int64_t>(at.first_head + h) * D * D;
            each_pair<D>(state[h], [&](int i, float& x, float& y) {
                *reinterpret_cast<float2*>(present + i) = make_float2(x * (1.0f / kStateUnit<T>),
                                                                      y * (1.0f / kStateUnit<T>));
            });
        }
    }
}

}  // namespace dijiang::prefill::hopper
