// Taking attention's outputs: GroupNorm over the heads' concatenation, affine, gate.
#pragma once

#include "attention/decode/norm.cuh"
#include "attention/terms.cuh"
#include "step/residual.cuh"

namespace dijiang {
namespace step {

// One pair of channels, normalised, to where the product reads it.
template <typename T, int R>
__device__ __forceinline__ void leave_attended(Context<T, R>& c, int row, int pair, float2 o, uint32_t gates, float4 affine) {
    const float2 g = unpack<T>(gates);
    c.template in_shared<uint32_t>(c.p.memory.attended)[x_index<R>(row, 2 * pair) / 2] =
        pack<T>(fmaf(o.x, affine.x, affine.y) * silu(g.x), fmaf(o.y, affine.z, affine.w) * silu(g.y));
}

// Where groups of H channels are 2, 4, .. 64: H / 2 neighbouring lanes, as decode::normalise_group computes. Several pairs
// of channels at once.
template <int kCount>
__device__ __forceinline__ void normalise_in_lanes(float2 (&o)[kCount], int heads, float inverse_heads, float epsilon) {
    constexpr float kShrink = 1.0f / 1024.0f;
    float largest[kCount], sum[kCount], shrink[kCount], squares[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        largest[i] = fmaxf(fabsf(o[i].x), fabsf(o[i].y));
        sum[i] = o[i].x * kShrink + o[i].y * kShrink;
    }
#pragma unroll 1
    for (int offset = heads >> 2; offset > 0; offset >>= 1) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            largest[i] = fmaxf(largest[i], __shfl_xor_sync(~0u, largest[i], offset));
            sum[i] += __shfl_xor_sync(~0u, sum[i], offset);
        }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        const uint32_t exponent = __float_as_uint(fmaxf(largest[i], 1.0f)) >> 23;
        shrink[i] = __uint_as_float((254u - (exponent < 253u ? exponent : 253u)) << 23);
        const float mean = sum[i] * shrink[i] * (inverse_heads / kShrink);
        o[i] = make_float2(__fmul_rn(o[i].x, shrink[i]) - mean, __fmul_rn(o[i].y, shrink[i]) - mean);
        squares[i] = o[i].x * o[i].x + o[i].y * o[i].y;
    }
#pragma unroll 1
    for (int offset = heads >> 2; offset > 0; offset >>= 1)
#pragma unroll
        for (int i = 0; i < kCount; ++i) squares[i] += __shfl_xor_sync(~0u, squares[i], offset);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        const float inverse = rsqrtf(squares[i] * inverse_heads + fmaxf(epsilon * shrink[i] * shrink[i], kLeastEpsilon));
        o[i] = make_float2(o[i].x * inverse, o[i].y * inverse);
    }
}

__device__ __forceinline__ bool groups_fit_lanes(int heads) { return heads >= 2 && heads <= 64 && (heads & (heads - 1)) == 0; }

    // Where heads are no power of two: groups by warps.
template <typename T, int R>     __device__ __forceinline__ void normalise_by_warps(Context<T, R>& c) {
        const Params& p = c.p;
        const int width = p.layout.width(), heads = p.layout.heads;
        const float2* const affines = c.template constant<float2>(p.places.group_norm);
        const float* const outputs = c.template in_shared<float>(p.memory.outputs);
        const T* const gates = c.template in_shared<T>(p.memory.gates);
        T* const attended = c.template in_shared<T>(p.memory.attended);
#pragma unroll 1
        for (int i = threadIdx.x / 32; i < R * p.layout.head_dim; i += kWarps) {
            const int row = i / p.layout.head_dim, base = (i - row * p.layout.head_dim) * heads;
            const float* const group = outputs + row * width + base;
            const T* const gate = gates + row * width + base;
            decode::normalise_group(
                heads, p.inverse_heads, p.group_norm_epsilon, [&](int channel) { return group[channel]; },
                [&](int channel, float y) {
                    const float2 both = __ldg(affines + base + channel);
                    attended[x_index<R>(row, base + channel)] =
                        from_float<T>(fmaf(y, both.x, both.y) * silu(to_float(gate[channel])));
                });
        }
        meet();
    }

// Waits for attention's outputs, kPairs pairs of channels of some rows at a time: a thread has pairs t, t + kThreads, ..
template <int kPairs, typename T, int R> __device__ __forceinline__ void take_outputs(Context<T, R>& c) {
    constexpr int kRows = R < 4 ? R : 4, kAtOnce = kPairs * kRows;
    const Params& p = c.p;
    const uint32_t pairs = p.layout.width() >> 1, heads = p.layout.heads;
    const uint4* const slots = c.template in_sync<uint4>(p.exchange.attention);
    const float4* const affines = c.template constant<float4>(p.places.group_norm);
    const bool in_lanes = groups_fit_lanes(heads);
    float2* const outputs = c.template in_shared<float2>(p.memory.outputs);
    uint32_t* const gates = c.template in_shared<uint32_t>(p.memory.gates);
#pragma unroll 1
    for (uint32_t start = kept(threadIdx.x); (start & ~31u) < pairs; start += kPairs * kThreads) {
        const Affines<kPairs> affine(affines, start, kThreads, pairs);
        const auto there = [&](int i) { return start + i % kPairs * kThreads < pairs; };
#pragma unroll 1
        for (uint32_t first = 0; first < R; first += kRows) {
            const Looks<kAtOnce, uint4> looks(
                slots + first * pairs + min(start, pairs - 1), c.tag,
                [&](int i) { return i / kPairs * pairs + i % kPairs * kThreads; }, there);
            __syncwarp();
            float2 o[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i)
                o[i] = there(i) ? make_float2(__uint_as_float(looks.of[i].x), __uint_as_float(looks.of[i].y)) : make_float2(0.0f, 0.0f);
            if (in_lanes) normalise_in_lanes(o, heads, p.inverse_heads, p.group_norm_epsilon);
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const uint32_t row = first + i / kPairs, pair = start + i % kPairs * kThreads;
                if (!there(i)) continue;
                if (in_lanes) {
                    leave_attended(c, row, pair, o[i], looks.of[i].z, affine.of[i % kPairs]);
                } else {
                    outputs[row * pairs + pair] = o[i];
                    gates[row * pairs + pair] = looks.of[i].z;
                }
            }
        }
    }
}
template <typename T, int R> __device__ __forceinline__ void take_outputs(Context<T, R>& c) {
    constexpr int kFew = R == 1 ? 2 : 1, kMany = kManyLooks != 16 ? kFew : R == 1 ? 5 : R == 2 ? 3 : 2;
    if (c.p.layout.width() <= kFew * 2 * kThreads) take_outputs<kFew>(c);
    else take_outputs<kMany>(c);
    meet();
    if (!groups_fit_lanes(c.p.layout.heads)) normalise_by_warps(c);
}

}  // namespace step
}  // namespace dijiang
