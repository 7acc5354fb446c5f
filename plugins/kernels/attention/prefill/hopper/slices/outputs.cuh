// The group that finishes outputs of the slice's columns: GroupNorm and gate.
//
// A lane has eight neighbouring channels of a token, 16 bytes of gates and of outputs: a group of GroupNorm is one
// lane, or as many neighbours as it has times eight channels.
#pragma once

#include "attention/prefill/hopper/slices/shape.cuh"

namespace dijiang::prefill::hopper::slices {

// Sum over `lanes` neighbours, 1, 2 or 4.
__device__ __forceinline__ float sum_over(int lanes, float x) {
    if (lanes > 1) x += __shfl_xor_sync(~0u, x, 1);
    if (lanes > 2) x += __shfl_xor_sync(~0u, x, 2);
    return x;
}

template <typename T, int D> __device__ __forceinline__ void make_outputs(const Walk<D>& walk) {
    using S = Slice<D>;
    constexpr int kUnits = kChunk / 16;  // of a lane: tokens 4 apart
    const AttentionParams& p = walk.p;
    const int lane = lane_of(), lanes = p.num_heads / 8;
    // A quarter of a warp reads four lanes' channels of two tokens: no two from the same banks.
    const int piece = lane % 4 + lane / 8 % 2 * 4, token = 16 * warp_of() + lane / 16 * 2 + lane / 4 % 2;
    const int64_t first = static_cast<int64_t>(walk.at.first_chunk) * kChunk + token;
    const uint16_t* gate = walk.at.gate + first * p.gate_token_stride + 8 * piece;
    uint16_t* output = walk.at.output + first * p.output_token_stride + 8 * piece;
    const float* const from = reinterpret_cast<const float*>(walk.memory + S::kOuts) + token * S::kOutPitch + 8 * piece;
    const int channel = walk.at.first_head * D + walk.slice * S::kColumns + 8 * piece;
    float weight[8], bias[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) weight[j] = p.norm_weight[channel + j], bias[j] = p.norm_bias[channel + j];
    const float share = 1.0f / p.num_heads, floor = kUnit<T> * kUnit<T> * fmaxf(p.epsilon, kLeastEpsilon);
    uint4 gates[kUnits];
    const auto load_gates = [&](int chunk) {
#pragma unroll
        for (int u = 0; u < kUnits; ++u)
            gates[u] = token + 4 * u < walk.left(chunk)
                           ? *reinterpret_cast<const uint4*>(gate + 4 * u * p.gate_token_stride)
                           : make_uint4(0, 0, 0, 0);
        gate += kChunk * p.gate_token_stride;
    };
    load_gates(0);
#pragma unroll 1
    for (int chunk = 0; chunk < walk.chunks; ++chunk) {
        float x[kUnits][8];
        await_phase(walk.barriers.outputs_full(), chunk & 1);
#pragma unroll
        for (int u = 0; u < kUnits; ++u)
#pragma unroll
            for (int j = 0; j < 8; j += 4) {
                const float4 four = *reinterpret_cast<const float4*>(from + 4 * u * S::kOutPitch + j);
                x[u][j] = four.x, x[u][j + 1] = four.y, x[u][j + 2] = four.z, x[u][j + 3] = four.w;
            }
        warp_arrives(walk.barriers.outputs_empty());
        const int left = walk.left(chunk);
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
            float sum = 0.0f, squares = 0.0f;
#pragma unroll
            for (int j = 0; j < 8; ++j) sum += x[u][j];
            const float mean = sum_over(lanes, sum) * share;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                x[u][j] -= mean;
                squares = fmaf(x[u][j], x[u][j], squares);
            }
            const float by = fast_rsqrt(fmaf(sum_over(lanes, squares), share, floor));
            uint32_t* const words = reinterpret_cast<uint32_t*>(&gates[u]);
#pragma unroll
            for (int j = 0; j < 8; j += 2) {
                const float2 z = unpack<T>(words[j / 2]);
                words[j / 2] = pack<T>(fmaf(x[u][j] * by, weight[j], bias[j]) * fast_silu(z.x),
                                       fmaf(x[u][j + 1] * by, weight[j + 1], bias[j + 1]) * fast_silu(z.y));
            }
            if (token + 4 * u < left) *reinterpret_cast<uint4*>(output + 4 * u * p.output_token_stride) = gates[u];
        }
        output += kChunk * p.output_token_stride;
        if (chunk + 1 < walk.chunks) load_gates(chunk + 1);
    }
}

}  // namespace dijiang::prefill::hopper::slices
