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
    const int size;
    float2 first_weight, first_bias;

    template <typename C> __device__ __forceinline__ Affine(const C& c, const int64_t& at, int n) : place(at), size(n) {
        const int pair = static_cast<int>(threadIdx.x) < size / 2 ? threadIdx.x : 0;
        first_weight = __ldg(c.template constant<float2>(place) + pair);
        first_bias = __ldg(c.template constant<float2>(place) + size / 2 + pair);
    }
    template <typename C> __device__ __forceinline__ float2 weight(const C& c, int pair) const {
        return pair == static_cast<int>(threadIdx.x) ? first_weight : __ldg(c.template constant<float2>(place) + pair);
    }
    template <typename C> __device__ __forceinline__ float2 bias(const C& c, int pair) const {
        return pair == static_cast<int>(threadIdx.x) ? first_bias
                                                     : __ldg(c.template constant<float2>(place) + size / 2 + pair);
    }
    template <typename T, typename C> __device__ __forceinline__ uint32_t apply(const C& c, float2 v, int pair) const {
        const float2 w = weight(c, pair), b = bias(c, pair);
        return pack<T>(fmaf(v.x, w.x, b.x), fmaf(v.y, w.y, b.y));
    }
};

// Rows whose slots a thread waits for together.
template <int R> constexpr int kRowsAtOnce = R < 4 ? R : 4;

// How many of a row's elements a warp's threads hold.
__device__ __forceinline__ float elements_of(int warp, int pairs) {
    const int rest = pairs % kThreads - 32 * warp;
    return static_cast<float>(2 * (pairs / kThreads * 32 + (rest < 0 ? 0 : rest > 32 ? 32 : rest)));
}
__device__ __forceinline__ float sum_of_sixteen(float v) {
#pragma unroll
    for (int offset = 8; offset > 0; offset /= 2) v += __shfl_xor_sync(~0u, v, offset);
    return v;
}

// Takes all rows of the residual stream, as they are behind layer 0's embedding (tag 0) or under that tag, and leaves
// them normalised in x1, and with another affine in x2 if there is one.
template <typename T, int R>
__device__ __forceinline__ void take_normalised(Context<T, R>& c, uint32_t tag, const Affine& affine, const Affine* other) {
    const Params& p = c.p;
    const int hidden = p.layout.hidden, pairs = hidden / 2, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const bool centred = p.norm == DIJIANG_LAYER_NORM;
    float2* raw = c.template in_shared<float2>(p.memory.raw);
    const uint2* slots = c.template in_sync<uint2>(p.exchange.hidden);
    constexpr int kAtOnce = kRowsAtOnce<R>;
    float sum[R] = {};
    for (int pair = threadIdx.x; pair < pairs; pair += kThreads) {
#pragma unroll
        for (int first = 0; first < R; first += kAtOnce) {
            uint4 v[kAtOnce];
            if (tag == 0) {
#pragma unroll
                for (int i = 0; i < kAtOnce; ++i) {
                    const float2 e = embedded(c, first + i, pair);
                    v[i] = make_uint4(__float_as_uint(e.x), 0u, __float_as_uint(e.y), 0u);
                }
            } else {
                await([&] {
                    bool there = true;
#pragma unroll
                    for (int i = 0; i < kAtOnce; ++i) {
                        v[i] = look_at_two(slots + (first + i) * hidden + 2 * pair);
                        there &= v[i].y == tag && v[i].w == tag;
                    }
                    return there;
                });
            }
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const float2 e = make_float2(__uint_as_float(v[i].x), __uint_as_float(v[i].z));
                raw[(first + i) * pairs + pair] = e;
                sum[first + i] += e.x + e.y;
            }
        }
    }
    // Each warp's sum, and its squares around its own mean; from those the row's, without a difference of large numbers.
    float2* statistics = c.template in_shared<float2>(p.memory.statistics);
    const float mine = elements_of(warp, pairs);
#pragma unroll
    for (int r = 0; r < R; ++r) {
        const float total = warp_sum(sum[r]), mean = centred && mine > 0.0f ? total / mine : 0.0f;
        float squares = 0.0f;
        for (int pair = threadIdx.x; pair < pairs; pair += kThreads) {
            const float2 e = raw[r * pairs + pair];
            squares += (e.x - mean) * (e.x - mean) + (e.y - mean) * (e.y - mean);
        }
        squares = warp_sum(squares);
        if (lane == 0) statistics[r * kWarps + warp] = make_float2(total, squares);
    }
    meet();
    T* x1 = c.template in_shared<T>(p.memory.x1);
    T* x2 = c.template in_shared<T>(p.memory.x2);
    const float theirs = elements_of(lane % kWarps, pairs), inverse = 1.0f / static_cast<float>(hidden);
#pragma unroll
    for (int r = 0; r < R; ++r) {
        const float2 s = statistics[r * kWarps + lane % kWarps];
        float mean = 0.0f, squares = s.y;
        if (centred) {
            mean = sum_of_sixteen(s.x) * inverse;
            const float off = theirs > 0.0f ? s.x / theirs - mean : 0.0f;
            squares += theirs * off * off;
        }
        const float scale = rsqrtf(sum_of_sixteen(squares) * inverse + p.norm_epsilon);
        for (int pair = threadIdx.x; pair < pairs; pair += kThreads) {
            const float2 e = raw[r * pairs + pair];
            const float2 n = make_float2((e.x - mean) * scale, (e.y - mean) * scale);
            const int at = x_index<R>(r, 2 * pair) / 2;
            reinterpret_cast<uint32_t*>(x1)[at] = affine.template apply<T>(c, n, pair);
            if (other != nullptr) reinterpret_cast<uint32_t*>(x2)[at] = other->template apply<T>(c, n, pair);
        }
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
