// The states of all rows and heads stream past, once their features are there: S' = a S + b phi(k) v, o = phi(q) S',
// GroupNorm, gate.
//
// A thread has four columns of every kSubs-th row of a head. It asks for its entries before it waits for the features,
// which the kernel ahead makes meanwhile; other blocks of a multiprocessor do the same, so that memory is never idle.
#pragma once

#include "attention/decode/batch/batch.h"
#include "attention/decode/norm.cuh"
#include "attention/terms.cuh"
#include "device/elements.cuh"
#include "device/math.cuh"
#include "device/overlap.cuh"

namespace dijiang {
namespace decode {

template <int D_, int W_, int Threads, int Ahead, int Slices, int MostHeads, int Blocks, bool Early> struct StateShape {
    static constexpr int D = D_, W = W_, kThreads = Threads;  // of a head, or its part of W columns
    static constexpr int kQuads = W / 4, kSubs = Threads / kQuads, kRows = D / kSubs;  // rows of a thread
    static constexpr int kAhead = Ahead;                                               // of which it has asked for
    static constexpr int kSlices = Slices;                                             // of features: features.cuh
    static constexpr int kMostHeads = MostHeads;                                       // of a block
    static constexpr int kBlocks = Blocks;  // with as many heads, at once; 0: as many as its registers let in
    // Norm and gate are asked for with the state, or when they are needed, which takes fewer registers.
    static constexpr bool kEarly = Early;
    static constexpr int kMemory = 8 * D + 4 * kSubs * W + (Early ? 12 : 4) * W;       // bytes, of each head
    static_assert(kQuads * kSubs == Threads && kRows * kSubs == D && kRows % Ahead == 0, "whole rows");
    static_assert(Threads % 32 == 0, "whole warps");
    static_assert(W <= Threads, "a thread has a channel");
};

// What a vector's features of one slice are to be multiplied by, given each slice's maximum and sum.
template <int Slices> __device__ __forceinline__ float slice_scale(const float2* slices, int own) {
    float2 each[Slices];
    float most = -INFINITY, total = 0.0f, mine = 0.0f;
#pragma unroll
    for (int i = 0; i < Slices; ++i) {
        each[i] = __ldcg(slices + i);
        most = fmaxf(most, each[i].x);
    }
#pragma unroll
    for (int i = 0; i < Slices; ++i) {
        const float power = fast_exp2(each[i].x - most);
        total += power * each[i].y;
        if (i == own) mine = power;
    }
    return __fdividef(mine, total);
}

template <typename T, typename S>
__device__ __forceinline__ void stream_states(const AttentionParams& p, const StateCut& cut, unsigned char* shared) {
    constexpr int D = S::D, W = S::W;
    float2* const features = reinterpret_cast<float2*>(shared);                        // [head][D]: of q, of k
    float* const parts = reinterpret_cast<float*>(features + cut.set_heads * D);       // [head][sub][W]
    float2* const affine = reinterpret_cast<float2*>(parts + cut.set_heads * S::kSubs * W);  // [head][W], if kEarly
    float* const raw = reinterpret_cast<float*>(affine + (S::kEarly ? cut.set_heads * W : 0));  // likewise
    const int thread = static_cast<int>(threadIdx.x), unit = thread / S::kThreads, own = thread - unit * S::kThreads;
    const int quad = own % S::kQuads, sub = own / S::kQuads;
    const int block = static_cast<int>(blockIdx.x), part = block / cut.splits, split = block - part * cut.splits;
    const int row = part / cut.sets, first_head = (part - row * cut.sets) * cut.set_heads, head = first_head + unit;
    let_next_kernel_start();

    const int64_t entry = static_cast<int64_t>(head) * (D * D) + sub * D + split * W + 4 * quad;
    const float* const past = p.past_state + row * p.past_batch_stride + entry;
    float* const present = p.present_state + row * p.present_batch_stride + entry;
    float4 state[S::kAhead];
#pragma unroll
    for (int j = 0; j < S::kAhead; ++j) state[j] = __ldcg(reinterpret_cast<const float4*>(past + j * S::kSubs * D));
    const int position = p.positions[row], valid = p.seq_lens[row], kv_head = head / cut.sharing;
    const T* const value = static_cast<const T*>(p.qkv) + row * p.qkv_batch_stride +
                           (p.num_heads + p.num_kv_heads + kv_head) * D + split * W + 4 * quad;
    const Terms terms = token_terms(p, head, position);
    float v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = terms.gain * to_float(value[i]);
    const float fade = expf(terms.log_decay);
    // A channel of GroupNorm and the gate.
    const int channel = head * D + split * W + own;
    float weight = 0.0f, bias = 0.0f, gate = 0.0f;
    if (S::kEarly && own < W) {
        weight = __ldg(p.norm_weight + channel);
        bias = __ldg(p.norm_bias + channel);
        gate = silu(to_float(static_cast<const T*>(p.gate)[row * p.gate_batch_stride + channel]));
    }
    T* const output = static_cast<T*>(p.output) + row * p.output_batch_stride + first_head * D + split * W;
    wait_for_previous_kernel();

    if (valid <= 0) {  // a row without a token: its states go over as they are
#pragma unroll 1
        for (int j = 0; p.present_state != p.past_state && j < S::kRows; ++j)
            __stcg(reinterpret_cast<float4*>(present + j * S::kSubs * D),
                   __ldcg(reinterpret_cast<const float4*>(past + j * S::kSubs * D)));
        for (int x = own; x < W; x += S::kThreads) {  // once at most, as below: see there
            output[unit * D + x] = from_float<T>(0.0f);
            if constexpr (S::kEarly) break;
        }
        return;
    }
    const float* const of_row = static_cast<const float*>(p.workspace) + int64_t{row} * cut.vectors_per_row * D;
    for (int i = own; i < D; i += S::kThreads) {
        float2 x = {__ldcg(of_row + head * D + i), __ldcg(of_row + (p.num_heads + kv_head) * D + i)};
        if constexpr (S::kSlices > 1) {
            const float2* const slices = reinterpret_cast<const float2*>(static_cast<const float*>(p.workspace) +
                                                                         int64_t{p.batch} * cut.vectors_per_row * D) +
                                         int64_t{row} * cut.vectors_per_row * S::kSlices;
            const int slice = i / (D / S::kSlices);
            x.x *= slice_scale<S::kSlices>(slices + head * S::kSlices, slice);
            x.y *= slice_scale<S::kSlices>(slices + (p.num_heads + kv_head) * S::kSlices, slice);
        }
        features[unit * D + i] = x;
    }
    if (S::kEarly && own < W) affine[unit * W + own] = {weight * gate, bias * gate};
    __syncthreads();

    float o[4] = {};
#pragma unroll
    for (int j = 0; j < S::kRows; ++j) {
        const float2 x = features[unit * D + sub + j * S::kSubs];
        float4 s = state[j % S::kAhead];
        if (j + S::kAhead < S::kRows)
            state[j % S::kAhead] = __ldcg(reinterpret_cast<const float4*>(past + (j + S::kAhead) * S::kSubs * D));
        s.x = fmaf(fade, s.x, x.y * v[0]);
        s.y = fmaf(fade, s.y, x.y * v[1]);
        s.z = fmaf(fade, s.z, x.y * v[2]);
        s.w = fmaf(fade, s.w, x.y * v[3]);
        __stcg(reinterpret_cast<float4*>(present + j * S::kSubs * D), s);
        o[0] = fmaf(x.x, s.x, o[0]);
        o[1] = fmaf(x.x, s.y, o[1]);
        o[2] = fmaf(x.x, s.z, o[2]);
        o[3] = fmaf(x.x, s.w, o[3]);
    }
    *reinterpret_cast<float4*>(parts + (unit * S::kSubs + sub) * W + 4 * quad) = {o[0], o[1], o[2], o[3]};
    __syncthreads();
    // Once at most. Written as a loop, it takes nvcc two registers fewer at d = 80, and two blocks find a place; with
    // the three blocks of d = 256 the loop spills.
    for (int x = own; x < W; x += S::kThreads) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < S::kSubs; ++i) sum += parts[(unit * S::kSubs + i) * W + x];
        raw[unit * W + x] = sum * terms.read_scale;
        if constexpr (S::kEarly) break;
    }
    __syncthreads();

    // A warp a group. The block's channels are whole groups: of one head's part, or of all heads of the set.
    const int groups = cut.set_heads * W / p.num_heads;
    const T* const opening = static_cast<const T*>(p.gate) + row * p.gate_batch_stride + first_head * D + split * W;
    const float* const norm_weight = p.norm_weight + first_head * D + split * W;
    const float* const norm_bias = p.norm_bias + first_head * D + split * W;
#pragma unroll 1
    for (int group = thread / 32; group < groups; group += static_cast<int>(blockDim.x / 32)) {
        const int base = group * p.num_heads;
        normalise_group(
            p.num_heads, cut.inverse_channels, p.epsilon, [&](int c) { return raw[base + c]; },
            [&](int c, float y) {
                const int x = base + c;
                if constexpr (S::kEarly) {
                    output[x] = from_float<T>(fmaf(y, affine[x].x, affine[x].y));
                } else {
                    const float normed = y * __ldg(norm_weight + x) + __ldg(norm_bias + x);
                    output[x] = from_float<T>(normed * silu(to_float(opening[x])));
                }
            });
    }
}

template <typename T, typename S>
__global__ void __launch_bounds__(S::kThreads * S::kMostHeads, S::kBlocks)
    states_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ StateCut cut) {
    extern __shared__ uint4 shared[];
    stream_states<T, S>(p, cut, reinterpret_cast<unsigned char*>(shared));
}

}  // namespace decode
}  // namespace dijiang
