// A decode step of a head in one block, or of its columns in the blocks of a cluster. The block asks for all of its
// state at once; the features are made while it arrives:
//
//   each thread turns an element of q and one of k (RoPE) and multiplies its rows of P with them;
//   the block   sums the threads' parts to W logits of q and of k, and sends them to the head's other blocks;
//   each warp   softmax over all D logits;
//   each thread S' = a S + b phi(k) v and phi(q) S' on its rows, as they arrive;
//   the block   sums o, normalises, gates, stores.
//
// Nothing waits for memory but the block itself, and the others of its multiprocessor stream meanwhile.
#pragma once

#include "attention/attention.h"
#include "attention/decode/heads/heads.h"
#include "attention/decode/heads/shape.cuh"
#include "attention/decode/norm.cuh"
#include "attention/rotary.cuh"
#include "attention/terms.cuh"
#include "device/cluster.cuh"
#include "device/elements.cuh"
#include "device/math.cuh"
#include "device/overlap.cuh"

namespace dijiang {
namespace decode {

// All of the thread's copies but those of the last `pending` groups are there.
__device__ __forceinline__ void wait_groups(int pending) {
    switch (pending) {
        case 0: return wait_copies<0>();
        case 1: return wait_copies<1>();
        case 2: return wait_copies<2>();
        default: return wait_copies<3>();
    }
}

// An element of q and one of k, and what they are turned with.
template <typename T> struct TurnedElement {
    T q, k, q_partner, k_partner;
    float inv_freq;

    __device__ __forceinline__ void load(const AttentionParams& p, const T* query, const T* key, int element) {
        q = q_partner = query[element];
        k = k_partner = key[element];
        inv_freq = 0.0f;
        const int half = p.rotary_dim / 2;
        if (element >= 2 * half) return;
        const bool first = element < half;  // subtracts the sine: its sign is in the angle
        const int other = first ? element + half : element - half;
        q_partner = query[other];
        k_partner = key[other];
        inv_freq = first ? -p.inv_freq[element] : p.inv_freq[other];
    }
    __device__ __forceinline__ float2 turned(int position) const {
        float cosine, sine;  // of elements that are not turned: 1 and 0
        rotary_cos_sin(rotary_turn(turns_per_token(inv_freq), static_cast<float>(position)), cosine, sine);
        return {to_float(q) * cosine + to_float(q_partner) * sine, to_float(k) * cosine + to_float(k_partner) * sine};
    }
};

// The columns' sums over this thread's rows, of q and of k.
template <typename T, typename S>
__device__ __forceinline__ void project(const float* proj, const float4 (&first)[S::kProjAhead], const float2* turned,
                                        int sub, float (&sums)[8]) {
    float4 columns[S::kProjAhead];
#pragma unroll
    for (int j = 0; j < S::kProjAhead; ++j) columns[j] = first[j];
#pragma unroll
    for (int at = 0; at < S::kRows; at += S::kProjAhead) {
#pragma unroll
        for (int j = 0; j < S::kProjAhead; ++j) {
            const float2 u = turned[sub + (at + j) * S::kSubs];
            const float4 rows = rounded<T>(columns[j]);
            if (at + S::kProjAhead < S::kRows)
                columns[j] = __ldg(reinterpret_cast<const float4*>(proj + (at + S::kProjAhead + j) * S::kSubs * S::D));
            const float c[4] = {rows.x, rows.y, rows.z, rows.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                sums[2 * i] = fmaf(u.x, c[i], sums[2 * i]);
                sums[2 * i + 1] = fmaf(u.y, c[i], sums[2 * i + 1]);
            }
        }
    }
}

// The features of q and of k, each to be divided by its sum, which is returned. All D logits are there.
template <typename S>
__device__ __forceinline__ float2 softmax(const float2* logits, float2* features, int warp, int lane) {
    float2 mine[S::kLogits], most = {-INFINITY, -INFINITY}, total = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < S::kLogits; ++i) {
        const int at = lane + 32 * i;
        mine[i] = {-INFINITY, -INFINITY};
        if (S::D % 32 == 0 || at < S::D) mine[i] = logits[at];
        most = {fmaxf(most.x, mine[i].x), fmaxf(most.y, mine[i].y)};
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        most.x = fmaxf(most.x, __shfl_xor_sync(~0u, most.x, offset));
        most.y = fmaxf(most.y, __shfl_xor_sync(~0u, most.y, offset));
    }
#pragma unroll
    for (int i = 0; i < S::kLogits; ++i) {
        mine[i] = {fast_exp2((mine[i].x - most.x) * kLog2E), fast_exp2((mine[i].y - most.y) * kLog2E)};
        total = {total.x + mine[i].x, total.y + mine[i].y};
        const int at = lane + 32 * i;
        if (warp == i % S::kWarps && (S::D % 32 == 0 || at < S::D)) features[at] = mine[i];  // all warps have the same
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        total.x += __shfl_xor_sync(~0u, total.x, offset);
        total.y += __shfl_xor_sync(~0u, total.y, offset);
    }
    return total;
}

template <typename T, typename S>
__device__ __forceinline__ void step_heads(const AttentionParams& p, const HeadCut& cut, unsigned char* shared) {
    constexpr int D = S::D, W = S::W;
    const int thread = static_cast<int>(threadIdx.x), unit = thread / S::kThreads, own = thread - unit * S::kThreads;
    const int quad = own % S::kQuads, sub = own / S::kQuads, lane = own % 32;
    const HeadMemory<S> memory(shared + unit * S::kMemory);
    const int block = static_cast<int>(blockIdx.x), part = block / S::kSplits;
    const int split = S::kSplits == 1 ? 0 : block - part * S::kSplits;  // the rank in the cluster
    const int row = part / cut.sets, first_head = (part - row * cut.sets) * cut.set_heads, head = first_head + unit;
    const int kv_head = head / cut.sharing;
    let_next_kernel_start();
    if (S::kSplits > 1) {
        if (thread == 0) make_arrival(memory.arrival);
        __syncwarp();  // the compiler lets the warp make it together
        if (thread == 0) expect_arrival(memory.arrival, D * sizeof(float2));
        appear_in_cluster();
    }
    wait_for_previous_kernel();

    const int64_t entry = static_cast<int64_t>(head) * (D * D) + sub * D + split * W + 4 * quad;
    const float* const past = p.past_state + row * p.past_batch_stride + entry;
    float* const present = p.present_state + row * p.present_batch_stride + entry;
    const float* const proj = p.proj + sub * D + split * W + 4 * quad;
    const T* const qkv = static_cast<const T*>(p.qkv) + row * p.qkv_batch_stride;
    const T* const key = qkv + (p.num_heads + kv_head) * D;
    const int position = p.positions[row], valid = p.seq_lens[row];
    float4 columns[S::kProjAhead];
#pragma unroll
    for (int j = 0; j < S::kProjAhead; ++j) columns[j] = __ldg(reinterpret_cast<const float4*>(proj + j * S::kSubs * D));
    TurnedElement<T> elements[S::kElements];
#pragma unroll
    for (int i = 0; i < S::kElements; ++i) {
        const int at = own + i * S::kThreads;
        elements[i].load(p, qkv + head * D, key, at < D ? at : 0);
    }
    constexpr int kFirstHeld = S::kRows - S::kHeld;
    float4 held[S::kHeld + 1];
#pragma unroll
    for (int j = 0; j < S::kRows; ++j) {
        if (j < kFirstHeld) copy_async(shared_address(memory.state + j * S::kThreads + own), past + j * S::kSubs * D);
        else held[j - kFirstHeld] = __ldcg(reinterpret_cast<const float4*>(past + j * S::kSubs * D));
        if ((j + 1) % (S::kRows / S::kGroups) == 0) commit_copies();
    }
    const Terms terms = token_terms(p, head, position);
    const Quad<T> value = *reinterpret_cast<const Quad<T>*>(key + p.num_kv_heads * D + split * W + 4 * quad);
    const int channel = head * D + split * W + own;
    float weight = 0.0f, bias = 0.0f, gate = 0.0f;
    if (own < W) {
        weight = p.norm_weight[channel];
        bias = p.norm_bias[channel];
        gate = to_float(static_cast<const T*>(p.gate)[row * p.gate_batch_stride + channel]);
    }
#pragma unroll
    for (int i = 0; i < S::kElements; ++i) {
        const int at = own + i * S::kThreads;
        if (at < D) memory.features[at] = elements[i].turned(position);
    }

    T* const output = static_cast<T*>(p.output) + row * p.output_batch_stride + first_head * D + split * W;
    if (valid <= 0) {  // a row without a token: its states go over as they are
        wait_copies<0>();
#pragma unroll 1
        for (int j = 0; p.present_state != p.past_state && j < kFirstHeld; ++j)
            __stcg(reinterpret_cast<float4*>(present + j * S::kSubs * D), memory.state[j * S::kThreads + own]);
#pragma unroll
        for (int j = kFirstHeld; j < S::kRows; ++j)
            if (p.present_state != p.past_state)
                __stcg(reinterpret_cast<float4*>(present + j * S::kSubs * D), held[j - kFirstHeld]);
        if (own < W) output[unit * D + own] = from_float<T>(0.0f);
        if (S::kSplits > 1) wait_for_cluster();
        return;
    }
    __syncthreads();

    float sums[8] = {};
    project<T, S>(proj, columns, memory.features, sub, sums);
#pragma unroll
    for (int offset = 16; offset >= S::kQuads && S::kLanes > 1; offset /= 2)
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[i] += __shfl_xor_sync(~0u, sums[i], offset);
    if (S::kLanes == 1 || lane < S::kQuads) {
        float4* const to = reinterpret_cast<float4*>(memory.sums + sub / S::kLanes * W + 4 * quad);
        to[0] = {sums[0], sums[1], sums[2], sums[3]};
        to[1] = {sums[4], sums[5], sums[6], sums[7]};
    }
    __syncthreads();
    if (S::kSplits > 1) wait_for_cluster();  // its blocks run
#pragma unroll
    for (int e = 0; e < S::kElements; ++e) {
        const int at = own + e * S::kThreads, column = at % W;
        if (at >= D) break;
        float2 logit = {0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < S::kParts; ++i) {
            const float2 sum = memory.sums[i * W + column];
            logit = {logit.x + sum.x, logit.y + sum.y};
        }
        if constexpr (S::kSplits > 1) {
            const uint64_t both = uint64_t{__float_as_uint(logit.y)} << 32 | __float_as_uint(logit.x);
            send(reinterpret_cast<uint64_t*>(memory.logits + split * W + column), both, at / W, memory.arrival);
        } else {
            memory.logits[column] = logit;
        }
    }
    if (S::kSplits > 1) await_arrival(memory.arrival);
    else __syncthreads();
    const float2 totals = softmax<S>(memory.logits, memory.features, own / 32, lane);
    const float fade = expf(terms.log_decay), write = __fdividef(terms.gain, totals.y);
    const float v[4] = {write * to_float(value.x), write * to_float(value.y), write * to_float(value.z),
                        write * to_float(value.w)};
    __syncthreads();
    if (own < W) {
        const float open = silu(gate);
        memory.affine[own] = {weight * open, bias * open};
    }

    float o[4] = {};
#pragma unroll
    for (int j = 0; j < S::kRows; ++j) {
        constexpr int kOfGroup = S::kRows / S::kGroups;
        if (j % kOfGroup == 0) wait_groups(S::kGroups - 1 - j / kOfGroup);
        const float2 x = memory.features[sub + j * S::kSubs];
        float4 s = j < kFirstHeld ? memory.state[j * S::kThreads + own] : held[j < kFirstHeld ? 0 : j - kFirstHeld];
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
#pragma unroll
    for (int offset = 16; offset >= S::kQuads && S::kLanes > 1; offset /= 2)
#pragma unroll
        for (int i = 0; i < 4; ++i) o[i] += __shfl_xor_sync(~0u, o[i], offset);
    if (S::kLanes == 1 || lane < S::kQuads)
        *reinterpret_cast<float4*>(memory.outputs + sub / S::kLanes * W + 4 * quad) = {o[0], o[1], o[2], o[3]};
    __syncthreads();
    if (own < W) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < S::kParts; ++i) sum += memory.outputs[i * W + own];
        memory.raw[own] = sum * __fdividef(terms.read_scale, totals.x);
    }
    __syncthreads();

    // A warp a group. The block's channels are whole groups: of one head's part, or of all heads of the set.
    const int groups = cut.set_heads * W / p.num_heads;
#pragma unroll 1
    for (int group = thread / 32; group < groups; group += static_cast<int>(blockDim.x / 32)) {
        const int base = group * p.num_heads;
        const auto of = [&](int channel) { return HeadMemory<S>(shared + channel / W * S::kMemory); };
        normalise_group(
            p.num_heads, cut.inverse_channels, p.epsilon, [&](int c) { return of(base + c).raw[(base + c) % W]; },
            [&](int c, float y) {
                const float2 line = of(base + c).affine[(base + c) % W];
                output[base + c] = from_float<T>(fmaf(y, line.x, line.y));
            });
    }
}

template <typename T, typename S>
__global__ void __launch_bounds__(S::kThreads * S::kMostHeads, S::kBlocks)
    heads_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ HeadCut cut) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    extern __shared__ uint4 shared[];
    step_heads<T, S>(p, cut, reinterpret_cast<unsigned char*>(shared));
#endif
}

template <typename T, typename S> HeadKernel head_instance() {
    HeadKernel it;
    it.function = reinterpret_cast<const void*>(heads_kernel<T, S>);
    it.splits = S::kSplits;
    it.head_threads = S::kThreads;
    it.head_memory = S::kMemory;
    it.most_heads = S::kMostHeads;
    it.blocks = S::kBlocks * S::kMostHeads;
    return it;
}

template <typename T> HeadKernel head_kernel(int32_t head_dim) {
    switch (head_dim) {
        case 64: return head_instance<T, HeadShape64>();
        case 80: return head_instance<T, HeadShape80>();
        case 128: return head_instance<T, HeadShape128>();
        case 256: return head_instance<T, HeadShape256>();
        default: return {};
    }
}

}  // namespace decode
}  // namespace dijiang
