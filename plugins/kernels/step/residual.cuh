// The residual stream: where it comes from, its norms, and what this block adds to its rows of it.
#pragma once

#include "step/context.cuh"

namespace dijiang {
namespace step {

// Two neighbouring elements of a token's embedding. In int8 and int4 they lie as in a bundle: q + 128, or q + 8 in four bits,
// the first in the lower ones.
template <bool kQuantised, typename T>
__device__ __forceinline__ float2 embedded_token(const Params& p, int64_t id, int pair) {
    const int64_t at = id * (p.layout.hidden / 2) + pair;
    if (!kQuantised || p.embedding_format == DIJIANG_SAME)
        return unpack<T>(__ldg(static_cast<const uint32_t*>(p.embedding) + at));
    const float scale = unpack<__half>(__ldg(static_cast<const uint16_t*>(p.embedding_scales) + at / (kChunk / 2))).x;
    if (p.embedding_format == DIJIANG_INT8) {
        const int both = __ldg(static_cast<const uint16_t*>(p.embedding) + at);
        return make_float2(static_cast<float>((both & 255) - 128) * scale, static_cast<float>((both >> 8) - 128) * scale);
    }
    const int both = __ldg(static_cast<const uint8_t*>(p.embedding) + at);
    return make_float2(static_cast<float>((both & 15) - 8) * scale, static_cast<float>((both >> 4) - 8) * scale);
}

// Two neighbouring elements of a row's embedding.
template <bool kQuantised, typename T, int R>
__device__ __forceinline__ float2 embedded(const Context<T, R>& c, int row, int pair) {
    const int64_t pairs = c.p.layout.hidden / 2;
    const BlockFacts& rows = c.facts();
    float2 v = embedded_token<kQuantised, T>(c.p, rows.id[row], pair);
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

// Leaves all rows of the residual stream in `raw` as they are behind the embedding, each pair to who will normalise it.
template <bool kQuantised, typename T, int R> __device__ __forceinline__ void take_embedding(const Context<T, R>& c) {
    const int pairs = c.p.layout.hidden / 2;
    float2* const raw = c.template in_shared<float2>(c.p.memory.raw);
#pragma unroll 1
    for (int pair = threadIdx.x; pair < pairs; pair += kThreads)
#pragma unroll 1
        for (int row = 0; row < R; ++row) raw[row * pairs + pair] = embedded<kQuantised>(c, row, pair);
    if (threadIdx.x < R) c.template in_shared<float>(c.p.memory.means)[threadIdx.x] = 0.0f;
}

// Sums over a warp of kCount values, each in the lanes from `32 / kCount` times its number on.
template <int kCount, int kOffset = 16, int kAll> __device__ __forceinline__ float sum_of_each(float (&values)[kAll]) {
    constexpr int kHalf = kCount / 2;
    if constexpr (kOffset == 0) {
        return values[0];
    } else if constexpr (kHalf == 0) {
        values[0] += __shfl_xor_sync(~0u, values[0], kOffset);
        return sum_of_each<1, kOffset / 2>(values);
    } else {
        const bool upper = threadIdx.x & kOffset;
#pragma unroll
        for (int i = 0; i < kHalf; ++i) {
            const float one = values[i], other = values[kHalf + i];
            values[i] = (upper ? other : one) + __shfl_xor_sync(~0u, upper ? one : other, kOffset);
        }
        return sum_of_each<kHalf, kOffset / 2>(values);
    }
}

// Of each row of the residual stream, what its elements are normalised with.
template <int R> struct Moments {
    float mean[R], scale[R];
};
// From the sums that the warps left in `statistics`, around the rows' last means; `last` is the one of row lane / (32 / R).
template <typename T, int R> __device__ __forceinline__ Moments<R> moments(const Context<T, R>& c, float last) {
    constexpr int kOfRow = 32 / R, kParts = kOfRow < kWarps ? kOfRow : kWarps;
    const Params& p = c.p;
    const int lane = kept(threadIdx.x) % 32, row = lane / kOfRow, part = lane % kOfRow;
    const float2* const statistics = c.template in_shared<float2>(p.memory.statistics) + row * kWarps;
    float sum = 0.0f, squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kWarps; i += kParts) {
        const float2 one = statistics[i + part % kParts];
        sum += one.x;
        squares += one.y;
    }
#pragma unroll
    for (int offset = kParts / 2; offset > 0; offset /= 2) {
        sum += __shfl_xor_sync(~0u, sum, offset);
        squares += __shfl_xor_sync(~0u, squares, offset);
    }
    float mean = 0.0f, variance = squares * p.inverse_hidden;
    if (p.norm == DIJIANG_LAYER_NORM) {
        const float off = sum * p.inverse_hidden;
        variance = fmaxf(fmaf(-off, off, variance), 0.0f);
        mean = last + off;
        if (static_cast<int>(threadIdx.x) == row * kOfRow) c.template in_shared<float>(p.memory.means)[row] = mean;
    }
    const float scale = rsqrtf(variance + p.norm_epsilon);
    Moments<R> all;
#pragma unroll
    for (int r = 0; r < R; ++r) {
        all.mean[r] = __shfl_sync(~0u, mean, r * kOfRow);
        all.scale[r] = __shfl_sync(~0u, scale, r * kOfRow);
    }
    return all;
}

// Normalises the rows of the residual stream that come under a tag, or with tag 0 those that are in `raw`, to x1, and
// with another affine to x2 if there is one. A thread has pairs t, t + kThreads, .. of all rows, kPairs at a time. Squares are
// summed around the mean that the row had last: it changes little.
template <int kPairs, typename T, int R>
__device__ __forceinline__ void take_normalised(Context<T, R>& c, uint32_t tag, int64_t place, bool second) {
    constexpr int kRows = R <= kManyLooks / 2 ? R : kManyLooks / 2, kAtOnce = kRows * kPairs;
    constexpr int kEarly = kPairs < 2 ? 2 : kPairs;
    const Params& p = c.p;
    const uint32_t pairs = p.layout.hidden >> 1, mine = kept(threadIdx.x), lane = mine % 32;
    const float4* const affines = c.template constant<float4>(place);
    const float4* const others = c.template constant<float4>(second ? p.places.mlp_norm : place);
    Affines<kEarly> affine(affines, mine, kThreads, pairs), other(others, mine, kThreads, pairs);
    float2* const raw = c.template in_shared<float2>(p.memory.raw);
    const uint2* const slots = c.template in_sync<uint2>(p.exchange.hidden);
    const float* const means = c.template in_shared<float>(p.memory.means);
    float pivots[R];
#pragma unroll
    for (int r = 0; r < R; ++r) pivots[r] = means[r];
    const float last = means[lane / (32 / R)];
    float sums[2 * R] = {};
#pragma unroll 1
    for (uint32_t start = mine; start < pairs; start += kPairs * kThreads) {
        const auto there = [&](int i) { return start + i % kPairs * kThreads < pairs; };
#pragma unroll
        for (int first = 0; first < R; first += kRows) {
            float2 e[kAtOnce];
            const auto at = [&](int i) { return (first + i / kPairs) * pairs + start + i % kPairs * kThreads; };
            if (tag == 0) {
#pragma unroll
                for (int i = 0; i < kAtOnce; ++i) e[i] = there(i) ? raw[at(i)] : make_float2(0.0f, 0.0f);
            } else {
                const Looks<kAtOnce, uint2> looks(slots + 2 * at(0), tag, [&](int i) { return 2 * (at(i) - at(0)); }, there);
#pragma unroll
                for (int i = 0; i < kAtOnce; ++i)
                    e[i] = make_float2(__uint_as_float(looks.of[i].x), __uint_as_float(looks.of[i].z));
            }
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const int row = first + i / kPairs;
                if (!there(i)) continue;
                raw[at(i)] = e[i];
                const float x = e[i].x - pivots[row], y = e[i].y - pivots[row];
                sums[2 * row] += x + y;
                sums[2 * row + 1] = fmaf(x, x, fmaf(y, y, sums[2 * row + 1]));
            }
        }
    }
    __syncwarp();
    const float sum = sum_of_each<2 * R>(sums);
    const int apart = 32 / (2 * R), number = lane / apart;
    float* const statistics = c.template in_shared<float>(p.memory.statistics);
    if (lane % apart == 0) statistics[(number / 2 * kWarps + threadIdx.x / 32) * 2 + number % 2] = sum;
    meet();
    const Moments<R> of = moments(c, last);
    uint32_t* const x1 = c.template in_shared<uint32_t>(p.memory.x1);
    uint32_t* const x2 = c.template in_shared<uint32_t>(p.memory.x2);
#pragma unroll 1
    for (uint32_t start = mine; start < pairs;) {
#pragma unroll
        for (int i = 0; i < kEarly; ++i) {
            const uint32_t pair = start + i * kThreads;
            if (pair >= pairs) continue;
#pragma unroll
            for (int row = 0; row < R; ++row) {
                const uint32_t at = x_index<R>(row, 2 * pair) / 2;
                const float2 e = raw[row * pairs + pair];
                const float x = (e.x - of.mean[row]) * of.scale[row], y = (e.y - of.mean[row]) * of.scale[row];
                x1[at] = apply<T>(affine.of[i], x, y);
                if (second) x2[at] = apply<T>(other.of[i], x, y);
            }
        }
        start += kEarly * kThreads;
        if (start >= pairs) break;
        affine = Affines<kEarly>(affines, start, kThreads, pairs);
        if (second) other = Affines<kEarly>(others, start, kThreads, pairs);
    }
    meet();
}

template <typename T, int R>
__device__ __forceinline__ void take_normalised(Context<T, R>& c, uint32_t tag, int64_t place, bool second) {
    constexpr int kFew = R == 1 ? 2 : 1, kMany = R == 1 ? (kManyLooks == 16 ? 5 : 3) : R <= 4 ? 2 : 1;
    if (kFew == kMany || c.p.layout.hidden <= kFew * 2 * kThreads) take_normalised<kFew>(c, tag, place, second);
    else take_normalised<kMany>(c, tag, place, second);
}

// This block's rows of the residual stream begin as the embedding.
template <bool kQuantised, typename T, int R> __device__ __forceinline__ void begin_own(Context<T, R>& c) {
    float* own = c.template in_shared<float>(c.p.memory.own);
    const int first = c.first_group(kDown) * kGroup, total = c.groups(kDown) * kGroup * R;
#pragma unroll 1
    for (int v = threadIdx.x; v < total; v += kThreads) {
        const int element = first + v / (kGroup * R) * kGroup + v % kGroup;
        const float2 pair = embedded<kQuantised>(c, v / kGroup % R, element / 2);
        own[v] = element % 2 ? pair.y : pair.x;
    }
}

// Adds to an element of this block's rows; all others hear of it if `tell`.
template <typename T, int R>
__device__ __forceinline__ void add_to_own(Context<T, R>& c, int row, int element, float sum, bool tell, uint32_t tag) {
    const int mine = element - c.first_group(kDown) * kGroup;
    float* const own = c.template in_shared<float>(c.p.memory.own) + (mine / kGroup * R + row) * kGroup + mine % kGroup;
    const float value = *own + sum;
    *own = value;
    if (tell) put(c.template in_sync<uint2>(c.p.exchange.hidden) + row * c.p.layout.hidden + element, __float_as_uint(value), tag);
}

}  // namespace step
}  // namespace dijiang
