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

// Where groups of H channels are 2, 4, .. 64: H / 2 neighbouring lanes, as decode::normalise_group computes.
__device__ __forceinline__ float2 normalise_in_lanes(float2 o, int heads, float inverse_heads, float epsilon) {
    constexpr float kShrink = 1.0f / 1024.0f;
    float largest = fmaxf(fabsf(o.x), fabsf(o.y)), sum = o.x * kShrink + o.y * kShrink;
#pragma unroll 1
    for (int offset = heads / 4; offset > 0; offset /= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, offset));
        sum += __shfl_xor_sync(~0u, sum, offset);
    }
    const uint32_t exponent = __float_as_uint(fmaxf(largest, 1.0f)) >> 23;
    const float shrink = __uint_as_float((254u - (exponent < 253u ? exponent : 253u)) << 23);
    const float mean = sum * shrink * (inverse_heads / kShrink);
    const float2 centred = make_float2(__fmul_rn(o.x, shrink) - mean, __fmul_rn(o.y, shrink) - mean);
    float squares = centred.x * centred.x + centred.y * centred.y;
#pragma unroll 1
    for (int offset = heads / 4; offset > 0; offset /= 2) squares += __shfl_xor_sync(~0u, squares, offset);
    const float inverse = rsqrtf(squares * inverse_heads + fmaxf(epsilon * shrink * shrink, kLeastEpsilon));
    return make_float2(centred.x * inverse, centred.y * inverse);
}

__device__ __forceinline__ bool groups_fit_lanes(int heads) { return heads >= 2 && heads <= 64 && (heads & (heads - 1)) == 0; }

// A pair of channels of all rows, or with one row two pairs, at once.
template <typename T, int R> __device__ __forceinline__ void take_attention(Context<T, R>& c) {
    // With one row, threads take pairs t and t + kThreads; with more, pair t of some rows.
    constexpr int kAtOnce = R == 1 ? 2 : R < 4 ? R : 4, kPairs = R == 1 ? 2 : 1, kRows = kAtOnce / kPairs;
    const Params& p = c.p;
    const uint32_t width = p.layout.width(), pairs = width >> 1, heads = p.layout.heads;
    const float4* const affines = c.template constant<float4>(p.places.group_norm);
    Affines<kPairs> affine(affines, threadIdx.x, kThreads, pairs);
    const uint4* const slots = c.template in_sync<uint4>(p.exchange.attention);
    const bool in_lanes = groups_fit_lanes(heads);
    float2* const outputs = c.template in_shared<float2>(p.memory.outputs);
    uint32_t* const gates = c.template in_shared<uint32_t>(p.memory.gates);
#pragma unroll 1
    for (uint32_t start = threadIdx.x; (start & ~31u) < pairs;) {
#pragma unroll 1
        for (int first = 0; first < R; first += kRows) {
            const uint4* from[kAtOnce];
            uint4 v[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i)
                from[i] = slots + (first + i / kPairs) * pairs + min(start + i % kPairs * kThreads, pairs - 1);
            await([&] {
                bool there = true;
#pragma unroll
                for (int i = 0; i < kAtOnce; ++i) {
                    v[i] = look(from[i]);
                    there &= v[i].w == c.tag;
                }
                return there;
            });
            __syncwarp();
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const uint32_t row = first + i / kPairs, pair = start + i % kPairs * kThreads;
                float2 o = make_float2(__uint_as_float(v[i].x), __uint_as_float(v[i].y));
                if (in_lanes) {
                    o = normalise_in_lanes(o, heads, p.inverse_heads, p.group_norm_epsilon);
                    if (pair < pairs) leave_attended(c, row, pair, o, v[i].z, affine.of[i % kPairs]);
                } else if (pair < pairs) {
                    outputs[row * pairs + pair] = o;
                    gates[row * pairs + pair] = v[i].z;
                }
            }
        }
        start += kPairs * kThreads;
        if (start < pairs) affine = Affines<kPairs>(affines, start, kThreads, pairs);
    }
    meet();
    if (in_lanes) return;
    T* const attended = c.template in_shared<T>(p.memory.attended);
#pragma unroll 1
    for (int i = threadIdx.x / 32; i < R * p.layout.head_dim; i += kWarps) {
        const int row = i / p.layout.head_dim, base = (i - row * p.layout.head_dim) * heads;
        const float* const group = reinterpret_cast<const float*>(outputs) + row * width + base;
        const T* const gate = reinterpret_cast<const T*>(gates) + row * width + base;
        decode::normalise_group(
            heads, p.inverse_heads, p.group_norm_epsilon, [&](int channel) { return group[channel]; },
            [&](int channel, float y) {
                const int at = base + channel;
                const float2 both = __ldg(reinterpret_cast<const float2*>(affines) + at);
                attended[x_index<R>(row, at)] = from_float<T>(fmaf(y, both.x, both.y) * silu(to_float(gate[channel])));
            });
    }
    meet();
}

}  // namespace step
}  // namespace dijiang
