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

// {weight, bias} of two neighbouring elements.
template <typename T> __device__ __forceinline__ uint32_t apply(const float4& affine, float x, float y) {
    return pack<T>(fmaf(x, affine.x, affine.y), fmaf(y, affine.z, affine.w));
}
// A thread's affines of some pairs, `step` apart; beyond the last pair the last again.
template <int kCount> struct Affines {
    float4 of[kCount];

    __device__ __forceinline__ Affines(const float4* all, uint32_t first, uint32_t step, uint32_t pairs) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) of[i] = __ldg(all + min(first + i * step, pairs - 1));
    }
};

// How the threads share the rows of the residual stream: so many for each, whole warps; each some pairs at once.
template <int R> struct RowShare {
    static constexpr int kOfRow = kThreads / R, kWarpsOfRow = kWarps / R, kAtOnce = R == 1 ? 2 : 4;
    const int row = threadIdx.x / kOfRow, mine = threadIdx.x % kOfRow;
};

// Leaves all rows of the residual stream in `raw` as they are behind the embedding, each pair to who will normalise it.
template <typename T, int R> __device__ __forceinline__ void take_embedding(const Context<T, R>& c) {
    const RowShare<R> share;
    const int pairs = c.p.layout.hidden / 2;
    float2* raw = c.template in_shared<float2>(c.p.memory.raw) + share.row * pairs;
#pragma unroll 1
    for (int pair = share.mine; pair < pairs; pair += RowShare<R>::kOfRow) raw[pair] = embedded(c, share.row, pair);
}

// Normalises the rows of the residual stream that come under a tag, or with tag 0 those that are in `raw`, to x1, and
// with another affine to x2 if there is one. Squares are summed around the mean that the row had last: it changes little.
template <typename T, int R>
__device__ __forceinline__ void take_normalised(Context<T, R>& c, uint32_t tag, int64_t place, bool second) {
    using Share = RowShare<R>;
    constexpr uint32_t kOfRow = Share::kOfRow;
    constexpr int kAtOnce = Share::kAtOnce, kEarly = R == 1 ? kAtOnce : 1;
    const Params& p = c.p;
    const Share share;
    const uint32_t pairs = p.layout.hidden >> 1, row = share.row, mine = share.mine;
    const float4* const affines = c.template constant<float4>(place);
    const float4* const others = c.template constant<float4>(second ? p.places.mlp_norm : place);
    Affines<kEarly> affine(affines, mine, kOfRow, pairs), other(others, mine, kOfRow, pairs);
    float2* const raw = c.template in_shared<float2>(p.memory.raw) + row * pairs;
    const uint2* const slots = c.template in_sync<uint2>(p.exchange.hidden) + 2 * row * pairs;
    float sum = 0.0f, squares = 0.0f;
#pragma unroll 1
    for (uint32_t start = mine; start < pairs; start += kAtOnce * kOfRow) {
        float2 e[kAtOnce];
        if (tag == 0) {
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) e[i] = raw[min(start + i * kOfRow, pairs - 1)];
        } else {
            const uint2* from[kAtOnce];
            uint4 v[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) from[i] = slots + 2 * min(start + i * kOfRow, pairs - 1);
            await([&] {
                bool there = true;
#pragma unroll
                for (int i = 0; i < kAtOnce; ++i) {
                    v[i] = look_at_two(from[i]);
                    there &= v[i].y == tag && v[i].w == tag;
                }
                return there;
            });
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) e[i] = make_float2(__uint_as_float(v[i].x), __uint_as_float(v[i].z));
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            if (start + i * kOfRow >= pairs) continue;
            raw[start + i * kOfRow] = e[i];
            const float x = e[i].x - c.pivot, y = e[i].y - c.pivot;
            sum += x + y;
            squares = fmaf(x, x, fmaf(y, y, squares));
        }
    }
    __syncwarp();
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        sum += __shfl_xor_sync(~0u, sum, offset);
        squares += __shfl_xor_sync(~0u, squares, offset);
    }
    float2* const statistics = c.template in_shared<float2>(p.memory.statistics) + row * Share::kWarpsOfRow;
    if (threadIdx.x % 32 == 0) statistics[share.mine / 32] = make_float2(sum, squares);
    meet();
    sum = squares = 0.0f;
#pragma unroll
    for (int i = 0; i < Share::kWarpsOfRow; ++i) sum += statistics[i].x, squares += statistics[i].y;
    const float inverse = p.inverse_hidden;
    float mean = 0.0f, variance = squares * inverse;
    if (p.norm == DIJIANG_LAYER_NORM) {
        const float off = sum * inverse;
        variance = fmaxf(fmaf(-off, off, variance), 0.0f);
        c.pivot = mean = c.pivot + off;
    }
    const float scale = rsqrtf(variance + p.norm_epsilon);
    uint32_t* const x1 = c.template in_shared<uint32_t>(p.memory.x1);
    uint32_t* const x2 = c.template in_shared<uint32_t>(p.memory.x2);
#pragma unroll 1
    for (uint32_t start = mine; start < pairs;) {
#pragma unroll
        for (int i = 0; i < kEarly; ++i) {
            const uint32_t pair = start + i * kOfRow, at = x_index<R>(row, 2 * pair) / 2;
            if (pair >= pairs) continue;
            const float2 e = raw[pair];
            const float x = (e.x - mean) * scale, y = (e.y - mean) * scale;
            x1[at] = apply<T>(affine.of[i], x, y);
            if (second) x2[at] = apply<T>(other.of[i], x, y);
        }
        start += kEarly * kOfRow;
        if (start >= pairs) break;
        affine = Affines<kEarly>(affines, start, kOfRow, pairs);
        if (second) other = Affines<kEarly>(others, start, kOfRow, pairs);
    }
    meet();
}

// This block's rows of the residual stream begin as the embedding.
template <typename T, int R> __device__ __forceinline__ void begin_own(Context<T, R>& c) {
    float* own = c.template in_shared<float>(c.p.memory.own);
    const int first = c.first_group(kDown) * kGroup, total = c.groups(kDown) * kGroup * R;
#pragma unroll 1
    for (int v = threadIdx.x; v < total; v += kThreads) {
        const int element = first + v / (kGroup * R) * kGroup + v % kGroup;
        const float2 pair = embedded(c, v / kGroup % R, element / 2);
        own[v] = element % 2 ? pair.y : pair.x;
    }
}

// Adds to an element of this block's rows; all others hear of it if `tell`.
template <typename T, int R>
__device__ __forceinline__ void add_to_own(Context<T, R>& c, int group, int row, int output, float sum, bool tell, uint32_t tag) {
    float* own = c.template in_shared<float>(c.p.memory.own) + (group * R + row) * kGroup + output;
    const float value = *own + sum;
    *own = value;
    if (tell)
        put(c.template in_sync<uint2>(c.p.exchange.hidden) + int64_t{row} * c.p.layout.hidden +
                (c.first_group(kDown) + group) * kGroup + output,
            __float_as_uint(value), tag);
}

}  // namespace step
}  // namespace dijiang
