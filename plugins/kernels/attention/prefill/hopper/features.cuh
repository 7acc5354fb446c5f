// From rows of q or k in shared memory to features in registers: RoPE, u P, softmax.
#pragma once

#include "attention/prefill/hopper/shape.cuh"
#include "attention/rotary.cuh"

namespace dijiang::prefill::hopper {

// A lane's part of a warp's rotation: the pairs (i, i + r/2), (i + 1, i + 1 + r/2) of every `groups`-th row.
struct RotaryLane {
    int i, group, groups;  // group >= groups: idle
    __device__ __forceinline__ explicit RotaryLane(int half) {
        const int units = max(1, half / 2);
        // Opaque, or the divisions would be done anew for every chunk.
        groups = opaque(half > 0 ? 32 / units : 0);
        group = opaque(lane_of() / units);
        i = 2 * (lane_of() - group * units);
    }
    // Of more pairs than a warp turns at once: the 64 from `first` on, which is a multiple of 64.
    __device__ __forceinline__ RotaryLane(int half, int first) {
        const int units = max(1, min(32, (half - first) / 2));
        groups = opaque(half > first ? 32 / units : 0);
        group = opaque(lane_of() / units);
        i = first + 2 * (lane_of() - group * units);
    }
    // Kept in memory, where registers are short.
    __device__ __forceinline__ explicit RotaryLane(const uint32_t* kept) {
        const uint32_t word = kept[lane_of()];
        i = word & 0xff, group = word >> 8 & 0xff, groups = word >> 16;
    }
    __device__ __forceinline__ void keep(uint32_t* kept) const { kept[lane_of()] = i | group << 8 | groups << 16; }
};

__device__ __forceinline__ float2 rotation_by(float turn) {
    constexpr float kTwoPi = 6.28318531f;
    float2 r;
    __sincosf(kTwoPi * turn, &r.y, &r.x);
    return r;
}

// All threads: per pair of dimensions, turns per token and the rotation from one of a lane's tokens to its next; what
// each lane of a warp does.
__device__ __forceinline__ void prepare_rotation(const AttentionParams& p, float4* turns, uint32_t* lanes) {
    const RotaryLane mine(p.rotary_dim / 2);
    if (threadIdx.x < 32) mine.keep(lanes);
    for (int i = threadIdx.x; i < p.rotary_dim / 2; i += blockDim.x) {
        const Turns t = turns_per_token(p.inv_freq[i]);
        const float2 step = rotation_by(rotary_turn(t, static_cast<float>(mine.groups)));
        turns[i] = make_float4(t.hi, t.lo, step.x, step.y);
    }
}

// A warp's 16 rows, from an accurate start per call by steps. `position`: of the chunk's first token.
template <typename T, int D>
__device__ __forceinline__ void rotate_rows(const RotaryLane& mine, int half, const float4* turns, char* tile,
                                            int position) {
    using Tile = typename Shape<D>::Tile;
    if (mine.group >= mine.groups) return;
    float2 r[2], step[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        const float4 turn = turns[mine.i + j];
        r[j] = rotation_by(rotary_turn({turn.x, turn.y}, static_cast<float>(position + 16 * warp_of() + mine.group)));
        step[j] = make_float2(turn.z, turn.w);
    }
    char* const first = tile + mine.i % 8 * 2;
    char* const second = tile + (mine.i + half) % 8 * 2;
#pragma unroll 2
    for (int t = mine.group; t < 16; t += mine.groups) {
        const uint32_t start = Tile::start(16 * warp_of() + t);
        uint32_t* left = reinterpret_cast<uint32_t*>(first + Tile::piece(start, kChunk, mine.i / 8));
        uint32_t* right = reinterpret_cast<uint32_t*>(second + Tile::piece(start, kChunk, (mine.i + half) / 8));
        const float2 a = unpack<T>(*left), b = unpack<T>(*right);
        *left = pack<T>(a.x * r[0].x - b.x * r[0].y, a.y * r[1].x - b.y * r[1].y);
        *right = pack<T>(b.x * r[0].x + a.x * r[0].y, b.y * r[1].x + a.y * r[1].y);
#pragma unroll
        for (int j = 0; j < 2; ++j)
            r[j] = make_float2(r[j].x * step[j].x - r[j].y * step[j].y, r[j].y * step[j].x + r[j].x * step[j].y);
    }
}

// A group: logits of a chunk's 64 rows. The rows are each warp's own until the barrier inside.
template <typename T, int D>
__device__ __forceinline__ void project(const AttentionParams& p, const RotaryLane& rotary, char* memory,
                                        uint32_t at, int tile, int position, int meeting,
                                        float (&logits)[D / 8][4]) {
    using S = Shape<D>;
    rotate_rows<T, D>(rotary, p.rotary_dim / 2, reinterpret_cast<const float4*>(memory + S::kTurns), memory + tile,
                      position);
    show_to_products();
    barrier_sync(meeting, kGroup);
    begin_products();
#pragma unroll
    for (int k = 0; k < D / 16; ++k)
        Wgmma<T, D>::template shared<0, 1>(logits, S::Tile::across(at + tile, kChunk, k),
                                           S::Tile::down(at + S::kProj, D, 0, k), k > 0);
    end_products();
    await_products<0>();
    barrier_sync(meeting, kGroup);  // nobody reads the rows any more
}

// Logits -> features times kUnit, packed as they stand: also as rows of a product's left operand.
template <typename T, int N>
__device__ __forceinline__ void softmax_rows(float (&x)[N][4], uint32_t (&packed)[N][2]) {
    constexpr int R = 2;  // rows of a lane
    float top[R], total[R];
#pragma unroll
    for (int i = 0; i < R; ++i) {
        top[i] = x[0][2 * i];
#pragma unroll
        for (int n = 0; n < N; ++n) top[i] = fmaxf(top[i], fmaxf(x[n][2 * i], x[n][2 * i + 1]));
    }
#pragma unroll
    for (int s = 1; s <= 2; s *= 2)
#pragma unroll
        for (int i = 0; i < R; ++i) top[i] = fmaxf(top[i], __shfl_xor_sync(~0u, top[i], s));
#pragma unroll
    for (int i = 0; i < R; ++i) {
        const float shift = -top[i] * kLog2E;
        float part[2] = {0.0f, 0.0f};
#pragma unroll
        for (int n = 0; n < N; ++n) {
            float &a = x[n][2 * i], &b = x[n][2 * i + 1];
            a = fast_exp2(fmaf(a, kLog2E, shift));
            b = fast_exp2(fmaf(b, kLog2E, shift));
            part[n % 2] += a + b;
        }
        total[i] = part[0] + part[1];
    }
#pragma unroll
    for (int s = 1; s <= 2; s *= 2)
#pragma unroll
        for (int i = 0; i < R; ++i) total[i] += __shfl_xor_sync(~0u, total[i], s);
#pragma unroll
    for (int i = 0; i < R; ++i) {
        const float scale = kUnit<T> * reciprocal(total[i]);
#pragma unroll
        for (int n = 0; n < N; ++n) packed[n][i] = pack<T>(x[n][2 * i] * scale, x[n][2 * i + 1] * scale);
    }
}

// Features of a chunk, whose sequence ends `end` tokens behind its beginning, times what is left of a key at its end, of
// the state at a query.
template <typename T, int N>
__device__ __forceinline__ void weigh_rows(int end, bool keys, float log2_decay, uint32_t (&packed)[N][2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int t = opaque(fragment_row()) + 8 * i, steps = keys ? end - 1 - t : t + 1;
        const float left = steps >= 0 ? fast_exp2(log2_decay * steps) * (kStateUnit<T> / kUnit<T>) : 0.0f;
        const uint32_t weight = pack<T>(left, left);
#pragma unroll
        for (int n = 0; n < N; ++n) packed[n][i] = multiply<T>(packed[n][i], weight);
    }
}

// A fragment's pairs to a chunk's tile.
template <typename Tile, int N>
__device__ __forceinline__ void store_fragment(uint32_t tile, const uint32_t (&packed)[N][2]) {
    const int lane = opaque(lane_of());
    const uint32_t start = tile + (Tile::start(16 * warp_of() + lane % 16) ^ lane / 16 * 16);
#pragma unroll
    for (int n = 0; n < N; n += 2)
        stmatrix(Tile::piece(start, kChunk, n), packed[n][0], packed[n][1], packed[n + 1][0], packed[n + 1][1]);
}

}  // namespace dijiang::prefill::hopper
