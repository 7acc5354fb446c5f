// The residual stream: where it comes from, its norms, and what this block adds to its rows of it.
#pragma once

#include "step/context.cuh"

namespace dijiang {
namespace step {

// Two neighbouring elements of a row's embedding.
template <typename T, int R>
__device__ __forceinline__ float2 embedded(const Context<T, R>& c, int row, int pair) {
    const int64_t pairs = c.p.layout.hidden / 2;
    const BlockFacts& rows = c.facts();
    float2 v = unpack<T>(__ldg(static_cast<const uint32_t*>(c.p.embedding) + rows.id[row] * pairs + pair));
    if (c.p.position_rows != 0) {
        const int64_t last = c.p.position_rows - 1, at = int64_t{rows.position[row]} + c.p.position_offset;
        const float2 w =
            unpack<T>(__ldg(static_cast<const uint32_t*>(c.p.position_embedding) + (at < last ? at : last) * pairs + pair));
        v.x += w.x;
        v.y += w.y;
    }
    return v;
}

// A norm's weights and biases at this thread's first pair, asked for before the rows are there.
struct Affine {
    const int64_t& place;  // among the layer's constants: weights, then biases
    const int size, mine;
    float2 first_weight, first_bias;

    template <typename C>
    __device__ __forceinline__ Affine(const C& c, const int64_t& at, int n, int first) : place(at), size(n), mine(first) {
        const int pair = mine < size / 2 ? mine : 0;
        first_weight = __ldg(c.template constant<float2>(place) + pair);
        first_bias = __ldg(c.template constant<float2>(place) + size / 2 + pair);
    }
    template <typename C> __device__ __forceinline__ float2 weight(const C& c, int pair) const {
        return pair == mine ? first_weight : __ldg(c.template constant<float2>(place) + pair);
    }
    template <typename C> __device__ __forceinline__ float2 bias(const C& c, int pair) const {
        return pair == mine ? first_bias : __ldg(c.template constant<float2>(place) + size / 2 + pair);
    }
    template <typename T, typename C> __device__ __forceinline__ uint32_t apply(const C& c, float2 v, int pair) const {
        const float2 w = weight(c, pair), b = bias(c, pair);
        return pack<T>(fmaf(v.x, w.x, b.x), fmaf(v.y, w.y, b.y));
    }
};

// How the threads share the rows of the residual stream: so many for each, whole warps.
template <int R> struct RowShare {
    static constexpr int kOfRow = kThreads / R, kWarpsOfRow = kWarps / R;
    const int row = threadIdx.x / kOfRow, mine = threadIdx.x % kOfRow;

    // How many of a row's elements one of its warps holds.
    static __device__ __forceinline__ float elements_of(int warp, int pairs) {
        const int rest = pairs % kOfRow - 32 * warp;
        return static_cast<float>(2 * (pairs / kOfRow * 32 + (rest < 0 ? 0 : rest > 32 ? 32 : rest)));
    }
    static __device__ __forceinline__ float sum_of_warps(float v) {
#pragma unroll
        for (int offset = kWarpsOfRow / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(~0u, v, offset);
        return v;
    }
};

// Takes all rows of the residual stream, as they are behind layer 0's embedding (tag 0) or under that tag, and leaves
// them normalised in x1, and with another affine in x2 if there is one.
template <typename T, int R>
__device__ __forceinline__ void take_normalised(Context<T, R>& c, uint32_t tag, const Affine& affine, const Affine* other) {
    constexpr int kAtOnce = 4;
    using Share = RowShare<R>;
    const Params& p = c.p;
    const Share share;
    const int pairs = p.layout.hidden / 2, warp = share.mine / 32, lane = threadIdx.x % 32, row = share.row;
    const bool centred = p.norm == DIJIANG_LAYER_NORM;
    float2* raw = c.template in_shared<float2>(p.memory.raw) + row * pairs;
    const uint2* slots = c.template in_sync<uint2>(p.exchange.hidden) + row * p.layout.hidden;
    float sum = 0.0f;
    for (int start = share.mine; start < pairs; start += kAtOnce * Share::kOfRow) {
        uint4 v[kAtOnce];
        if (tag == 0) {
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const int pair = start + i * Share::kOfRow;
                const float2 e = pair < pairs ? embedded(c, row, pair) : make_float2(0.0f, 0.0f);
                v[i] = make_uint4(__float_as_uint(e.x), 0u, __float_as_uint(e.y), 0u);
            }
        } else {
            await([&] {
                bool there = true;
#pragma unroll
                for (int i = 0; i < kAtOnce; ++i) {
                    const int pair = start + i * Share::kOfRow;
                    if (pair >= pairs) continue;
                    v[i] = look_at_two(slots + 2 * pair);
                    there &= v[i].y == tag && v[i].w == tag;
                }
                return there;
            });
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int pair = start + i * Share::kOfRow;
            if (pair >= pairs) continue;
            const float2 e = make_float2(__uint_as_float(v[i].x), __uint_as_float(v[i].z));
            raw[pair] = e;
            sum += e.x + e.y;
        }
    }
    // Each warp's sum, and its squares around its own mean; from those the row's, without a difference of large numbers.
    float2* statistics = c.template in_shared<float2>(p.memory.statistics) + row * Share::kWarpsOfRow;
    const float held = Share::elements_of(warp, pairs);
    const float total = warp_sum(sum), middle = centred && held > 0.0f ? __fdividef(total, held) : 0.0f;
    float squares = 0.0f;
    for (int pair = share.mine; pair < pairs; pair += Share::kOfRow) {
        const float2 e = raw[pair];
        squares += (e.x - middle) * (e.x - middle) + (e.y - middle) * (e.y - middle);
    }
    squares = warp_sum(squares);
    if (lane == 0) statistics[warp] = make_float2(total, squares);
    meet();
    T* x1 = c.template in_shared<T>(p.memory.x1);
    T* x2 = c.template in_shared<T>(p.memory.x2);
    const float theirs = Share::elements_of(lane % Share::kWarpsOfRow, pairs);
    const float inverse = 1.0f / static_cast<float>(p.layout.hidden);
    const float2 s = statistics[lane % Share::kWarpsOfRow];
    float mean = 0.0f;
    squares = s.y;
    if (centred) {
        mean = Share::sum_of_warps(s.x) * inverse;
        const float off = theirs > 0.0f ? __fdividef(s.x, theirs) - mean : 0.0f;
        squares += theirs * off * off;
    }
    const float scale = rsqrtf(Share::sum_of_warps(squares) * inverse + p.norm_epsilon);
#pragma unroll 4
    for (int pair = share.mine; pair < pairs; pair += Share::kOfRow) {
        const float2 e = raw[pair];
        const float2 n = make_float2((e.x - mean) * scale, (e.y - mean) * scale);
        const int at = x_index<R>(row, 2 * pair) / 2;
        reinterpret_cast<uint32_t*>(x1)[at] = affine.template apply<T>(c, n, pair);
        if (other != nullptr) reinterpret_cast<uint32_t*>(x2)[at] = other->template apply<T>(c, n, pair);
    }
    meet();
}

// This block's rows of the residual stream begin as the embedding.
template <typename T, int R> __device__ __forceinline__ void begin_own(Context<T, R>& c) {
    float* own = c.template in_shared<float>(c.p.memory.own);
    const int first = c.first_group(kDown) * kGroup, total = c.groups(kDown) * kGroup * R;
    for (int v = threadIdx.x; v < total; v += kThreads) {
        const int element = first + v / (kGroup * R) * kGroup + v % kGroup;
        const float2 pair = embedded(c, v / kGroup % R, element / 2);
        own[v] = element % 2 ? pair.y : pair.x;
    }
}

// Adds `sum` to an element and tells everybody.
template <typename T, int R>
__device__ __forceinline__ void add_to_own(Context<T, R>& c, int group, int row, int output, float sum, uint32_t tag) {
    float* own = c.template in_shared<float>(c.p.memory.own) + (group * R + row) * kGroup + output;
    const float value = *own + sum;
    *own = value;
    put(c.template in_sync<uint2>(c.p.exchange.hidden) + int64_t{row} * c.p.layout.hidden +
            (c.first_group(kDown) + group) * kGroup + output,
        __float_as_uint(value), tag);
}

}  // namespace step
}  // namespace dijiang
