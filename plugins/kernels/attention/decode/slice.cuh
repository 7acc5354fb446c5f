// Decode for the common head sizes on GPUs with thread-block clusters: DijiangAttention of one token per row.
//
// A head's state [D, D] is cut into column slices of W; a block owns one slice of one head at a time and
// keeps its slice of P, [D, W], in registers for as long as it lives. Per item:
//
//   each warp   turns its share of q and k (RoPE) and multiplies it with its rows of P's slice;
//   the block   sums the warps' parts to W logits of q and of k, and sends them to the head's other blocks;
//   each warp   softmax over all D logits, S' = a S + b phi(k) v and phi(q) S' on its rows;
//   the block   sums o, exchanges it if GroupNorm groups leave the slice, normalises, gates, stores.
//
// The next item's state is requested piece by piece as this item's is used up, and arrives while its features
// are computed. Nothing waits for the whole cluster: blocks send to mbarriers (cluster.cuh).
#pragma once

#include "attention/decode/cluster.cuh"
#include "attention/decode/cut.h"
#include "attention/decode/norm.cuh"
#include "attention/decode/slice_shape.cuh"
#include "attention/rotary.cuh"
#include "attention/terms.cuh"
#include "device/copies.cuh"
#include "device/elements.cuh"
#include "device/math.cuh"
#include "device/overlap.cuh"

namespace dijiang {
namespace decode {

template <typename T, typename S, int Blocks, int Ahead>
__global__ void __launch_bounds__(S::kThreads, Blocks)
    slice_decode(const __grid_constant__ AttentionParams p, const __grid_constant__ SliceCut cut) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    constexpr int D = S::D, W = S::W, kWarps = S::kWarps, kThreads = S::kThreads;
    constexpr int kRows = S::kRows, kSteps = S::kSteps, kSubs = S::kSubs;
    constexpr bool kExchange = S::kSplits > 1;
    constexpr int kMostClusterChannels = 8 * W;
    __shared__ alignas(16) float2 logits[2][D];  // (q, k); two sets, for this item and the next
    __shared__ alignas(16) float2 features[D];   // each warp's own rows, not yet divided by their sums
    __shared__ alignas(16) float2 logit_parts[kWarps][W];
    __shared__ alignas(16) float output_parts[kWarps][W];
    __shared__ alignas(16) float raw[2][kMostClusterChannels];
    __shared__ alignas(16) float values[2][W];   // v
    __shared__ alignas(16) float2 affine[2][W];  // (weight, bias) of GroupNorm times the gate
    __shared__ alignas(8) uint64_t logits_there[2], raw_there[2];
    extern __shared__ float4 slots[];  // states of the next items: each thread's own, touched by nobody else

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int quad = lane % S::kQuads, sub = lane / S::kQuads;
    const int rank = cluster_rank(), blocks = cut.heads * S::kSplits;
    const int split = rank % S::kSplits, first_peer = rank - split;
    const int first_row = warp * kRows;  // of the features of this warp
    const auto holds = [&](int step) { return S::kFull || (sub < kSubs && sub + step * kSubs < kRows); };

    let_next_kernel_start();
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; ++i) {
            mbarrier_init(&logits_there[i], 1);
            mbarrier_init(&raw_there[i], 1);
        }
        mbarrier_publish();
    }
    if (blocks > 1) cluster_arrive();

    // Where items are: item = row * items_per_row + unit, a unit being `heads` heads.
    const int stride = cluster_count(), row_stride = cut.items_per_row.quotient(stride);
    const int head_stride = stride * cut.heads - row_stride * p.num_heads;
    int item = cluster_index(), row = cut.items_per_row.quotient(item);
    int head = item * cut.heads - row * p.num_heads + rank / S::kSplits;  // of this block
    const auto step_on = [&](int& row, int& head) {
        row += row_stride;
        head += head_stride;
        if (head >= p.num_heads) {
            head -= p.num_heads;
            ++row;
        }
    };
    const uint32_t in_head = (first_row + sub) * D + split * W + 4 * quad;  // this thread's first state entry
    const int half = p.rotary_dim / 2;
    wait_for_previous_kernel();

    // Requested one item ahead, and not touched before it is needed: elements of q and k and their partners,
    // and by the first W threads a column's value, gate and affine.
    T own[S::kTurned], partner[S::kTurned], value = T(), opening = T();
    float weight = 0.0f, bias = 0.0f;
    int position = 0, valid = 0;
    // Of q; of k in further lanes or in a second element.
    const int turned_row = first_row + (S::kTurned == 1 ? lane % kRows : min(lane, kRows - 1));
    const auto request = [&](int row, int head) {
        position = p.positions[row];
        valid = p.seq_lens[row];
        const T* qkv = static_cast<const T*>(p.qkv) + row * p.qkv_batch_stride;
        const int kv_head = cut.sharing.quotient(head), key = (p.num_heads + kv_head) * D;
        const int other = turned_row < half       ? turned_row + half
                          : turned_row < 2 * half ? turned_row - half
                                                  : turned_row;
#pragma unroll
        for (int i = 0; i < S::kTurned; ++i) {
            const T* from = qkv + (i == 0 && (S::kTurned == 2 || lane < kRows) ? head * D : key);
            own[i] = from[turned_row];
            partner[i] = from[other];
        }
        if (threadIdx.x < W) {
            const int column = head * D + split * W + threadIdx.x;
            value = qkv[key + p.num_kv_heads * D + split * W + threadIdx.x];
            opening = static_cast<const T*>(p.gate)[row * p.gate_batch_stride + column];
            weight = __ldg(p.norm_weight + column);
            bias = __ldg(p.norm_bias + column);
        }
    };

    // Requested `Ahead` items ahead: the state.
    int ahead_item = item, ahead_row = row, ahead_head = head;
    const float* ahead = nullptr;
    const auto aim = [&] {
        ahead = p.past_state + ahead_row * p.past_batch_stride +
                static_cast<int64_t>(ahead_head) * (D * D) + in_head;
    };
    const auto request_state = [&](float4* to, int j) {
        if (ahead_item < cut.items && holds(j)) copy_async_256(to + j * kThreads, ahead + j * kSubs * D);
    };
    const auto requested = [&] {
        commit_copies();
        ahead_item += stride;
        step_on(ahead_row, ahead_head);
    };

    if (item < cut.items) request(row, head);
    Turns turns = {0.0f, 0.0f};
    if (turned_row < 2 * half) {
        // The first half of a pair subtracts the partner's sine: fold the sign into the angle.
        const float inv_freq = __ldg(p.inv_freq + (turned_row < half ? turned_row : turned_row - half));
        turns = turns_per_token(turned_row < half ? -inv_freq : inv_freq);
    }
    float4 columns[kSteps];
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
        columns[j] = {0.0f, 0.0f, 0.0f, 0.0f};
        const float* from = p.proj + in_head + j * kSubs * D;
        if (holds(j)) columns[j] = __ldg(reinterpret_cast<const float4*>(from));
    }
    float4* slot = slots + threadIdx.x;
#pragma unroll
    for (int i = 0; i < Ahead; ++i) {
        aim();
#pragma unroll
        for (int j = 0; j < kSteps; ++j) request_state(slot + i * kSteps * kThreads, j);
        requested();
    }
    Quad<T> proj[kSteps];
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
        proj[j] = {from_float<T>(columns[j].x), from_float<T>(columns[j].y), from_float<T>(columns[j].z),
                   from_float<T>(columns[j].w)};
    }

    const auto next = [&](int row, int head) {  // this item's slot is requested anew, and its inputs are used
        requested();
        if (Ahead > 1) {
            slot += kSteps * kThreads;
            if (slot >= slots + Ahead * kSteps * kThreads) slot -= Ahead * kSteps * kThreads;
        }
        if (item + stride < cut.items) request(row, head);
    };
    // This block's channels in its head set, and the groups that they belong to.
    const int begin = (cut.norm == Norm::cluster ? rank : split) * W;
    const int first_group = cut.channels.quotient(begin), last_group = cut.channels.quotient(begin + W - 1);
    bool met = blocks == 1;  // whether the whole cluster is known to run
    uint32_t used = 0;       // items that sent anything: selects buffers and phases
    for (int next_row, next_head; item < cut.items; item += stride, row = next_row, head = next_head) {
        next_row = row;
        next_head = head;
        step_on(next_row, next_head);
        const int start = head * D + split * W;  // the block's channels: W from here
        T* const output = static_cast<T*>(p.output) + row * p.output_batch_stride + start;
        float* const present = p.present_state + row * p.present_batch_stride +
                               static_cast<int64_t>(head) * (D * D) + in_head;
        aim();
        if (valid <= 0) {
            wait_copies<Ahead - 1>();
#pragma unroll 2
            for (int j = 0; j < kSteps; ++j) {
                if (p.present_state != p.past_state && holds(j)) {
                    __stcg(reinterpret_cast<float4*>(present + j * kSubs * D), slot[j * kThreads]);
                }
                request_state(slot, j);
            }
            if (threadIdx.x < W) output[threadIdx.x] = from_float<T>(0.0f);
            next(next_row, next_head);
            continue;
        }

        const Terms terms = token_terms(p, head, position);
        const uint32_t buffer = used & 1, parity = (used >> 1) & 1;
        ++used;
        if (threadIdx.x == 0) {
            if (kExchange) mbarrier_expect(&logits_there[buffer], D * sizeof(float2));
            if (cut.norm == Norm::cluster) mbarrier_expect(&raw_there[buffer], blocks * W * sizeof(float));
        }

        // RoPE on this warp's elements, then their products with P's rows.
        float u[S::kTurned];
#pragma unroll
        for (int i = 0; i < S::kTurned; ++i) {
            float cosine, sine;
            rotary_cos_sin(rotary_turn(turns, static_cast<float>(position)), cosine, sine);
            u[i] = to_float(own[i]) * cosine + to_float(partner[i]) * sine;
        }
        float acc[8] = {};  // 4 columns of (q, k)
#pragma unroll
        for (int j = 0; j < kSteps; ++j) {
            const int local = sub + j * kSubs;
            const float q = __shfl_sync(~0u, u[0], local & 31);
            const float k = __shfl_sync(~0u, u[S::kTurned - 1], (S::kKeyLane + local) & 31);
            const float columns[4] = {to_float(proj[j].x), to_float(proj[j].y), to_float(proj[j].z),
                                      to_float(proj[j].w)};
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                acc[2 * c] = fmaf(q, columns[c], acc[2 * c]);
                acc[2 * c + 1] = fmaf(k, columns[c], acc[2 * c + 1]);
            }
        }
        {
            using Sum = SubSum<S::kQuads, kSubs, 8>;
            const int start = Sum::run(acc, lane);
            float* to = reinterpret_cast<float*>(logit_parts[warp]) + 8 * quad + start;
            if (start >= 0) {
#pragma unroll
                for (int i = 0; i < Sum::kKept; ++i) to[i] = acc[i];
            }
        }
        if (threadIdx.x < W) {
            const float gate = silu(to_float(opening));
            values[buffer][threadIdx.x] = to_float(value);
            affine[buffer][threadIdx.x] = {weight * gate, bias * gate};
        }
        if (!met) {
            cluster_wait();
            met = true;
        }
        __syncthreads();
#pragma unroll 1
        for (int i = threadIdx.x; i < W * S::kSplits; i += kThreads) {
            const int column = i % W;
            float2 sum = {0.0f, 0.0f};
#pragma unroll
            for (int w = 0; w < kWarps; ++w) {
                sum.x += logit_parts[w][column].x;
                sum.y += logit_parts[w][column].y;
            }
            float2* to = &logits[buffer][split * W + column];
            if (kExchange) {
                const uint32_t peer = first_peer + i / W;
                send(address_at(to, peer), sum, address_at(&logits_there[buffer], peer));
            } else {
                *to = sum;
            }
        }
        if (kExchange) {
            mbarrier_wait(&logits_there[buffer], parity);
        } else {
            __syncthreads();
        }

        // Softmax: every warp finds the maxima and sums of all D logits, of q in its lower and of k in its upper
        // half. phi(q) is divided by its sum at the end.
        const float* half_logits = reinterpret_cast<const float*>(logits[buffer] + lane % 16) + lane / 16;
        float mine[S::kLogits], most = -INFINITY, total = 0.0f;
#pragma unroll
        for (int i = 0; i < S::kLogits; ++i) {
            mine[i] = half_logits[32 * i];
            most = fmaxf(most, mine[i]);
        }
#pragma unroll
        for (int offset = 8; offset > 0; offset /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, offset));
        const float other_most = __shfl_xor_sync(~0u, most, 16);
        const float2 most_of = lane < 16 ? make_float2(most, other_most) : make_float2(other_most, most);
#pragma unroll
        for (int i = 0; i < S::kLogits; ++i) total += fast_exp2((mine[i] - most) * kLog2E);
        if (lane < kRows) {
            const float2 x = logits[buffer][first_row + lane];
            features[first_row + lane] = {fast_exp2((x.x - most_of.x) * kLog2E),
                                          fast_exp2((x.y - most_of.y) * kLog2E)};
        }
#pragma unroll
        for (int offset = 8; offset > 0; offset /= 2) total += __shfl_xor_sync(~0u, total, offset);
        const float other_total = __shfl_xor_sync(~0u, total, 16);
        const float query_total = lane < 16 ? total : other_total;
        const float key_total = lane < 16 ? other_total : total;
        __syncwarp();

        // S' and phi(q) S' on this warp's rows.
        const float fade = expf(terms.log_decay), write = __fdividef(terms.gain, key_total);
        const float read = __fdividef(terms.read_scale, query_total);
        float4 v = *reinterpret_cast<const float4*>(&values[buffer][4 * quad]);
        v = {write * v.x, write * v.y, write * v.z, write * v.w};
        float o[4] = {};
        wait_copies<Ahead - 1>();
#pragma unroll(kSteps < 8 ? kSteps : 8)
        for (int j = 0; j < kSteps; ++j) {
            if (holds(j)) {
                const float2 x = features[first_row + sub + j * kSubs];
                const float q = x.x, k = x.y;
                float4 s = slot[j * kThreads];
                s.x = fmaf(fade, s.x, k * v.x);
                s.y = fmaf(fade, s.y, k * v.y);
                s.z = fmaf(fade, s.z, k * v.z);
                s.w = fmaf(fade, s.w, k * v.w);
                __stcg(reinterpret_cast<float4*>(present + j * kSubs * D), s);
                o[0] = fmaf(q, s.x, o[0]);
                o[1] = fmaf(q, s.y, o[1]);
                o[2] = fmaf(q, s.z, o[2]);
                o[3] = fmaf(q, s.w, o[3]);
                request_state(slot, j);
            }
        }
        next(next_row, next_head);
        {
            using Sum = SubSum<S::kQuads, kSubs, 4>;
            const int start = Sum::run(o, lane);
            if (start >= 0) {
#pragma unroll
                for (int i = 0; i < Sum::kKept; ++i) output_parts[warp][4 * quad + start + i] = o[i];
            }
        }
        __syncthreads();
        const auto whole = [&](int column) {
            float sum = 0.0f;
#pragma unroll
            for (int w = 0; w < kWarps; ++w) sum += output_parts[w][column];
            return sum * read;
        };

        // GroupNorm and gate.
        if (cut.norm == Norm::memory) {
            float* raw_outputs =
                static_cast<float*>(p.workspace) + static_cast<int64_t>(row) * p.num_heads * D;
            if (threadIdx.x < W) raw_outputs[start + threadIdx.x] = whole(threadIdx.x);
            const int set = head / cut.set_heads, sets = p.num_heads / cut.set_heads;
            if (arrives_last(p.sync + row * sets + set, cut.set_heads * S::kSplits)) {
                finish_set<T>(p, row, set, cut.set_heads * D);
            }
            continue;
        }
        if (cut.norm == Norm::cluster) {
#pragma unroll 1
            for (int i = threadIdx.x; i < W * blocks; i += kThreads) {
                const uint32_t peer = i / W;
                send(address_at(&raw[buffer][rank * W + i % W], peer), whole(i % W),
                     address_at(&raw_there[buffer], peer));
            }
            mbarrier_wait(&raw_there[buffer], parity);
        }
#pragma unroll 1
        for (int group = first_group + warp; group <= last_group; group += kWarps) {
            const int base = group * p.num_heads;
            normalise_group(
                p.num_heads, cut.inverse_channels, p.epsilon,
                [&](int c) {
                    return cut.norm == Norm::cluster ? raw[buffer][base + c] : whole(base + c - begin);
                },
                [&](int c, float y) {
                    const int x = base + c - begin;
                    if (x < 0 || x >= W) return;
                    const float2 line = affine[buffer][x];
                    output[x] = from_float<T>(fmaf(y, line.x, line.y));
                });
        }
    }
    if (!met) cluster_wait();
#endif
}

// The instances of one element type, as measured best on an H200: for few heads, cut into narrow slices so
// that every multiprocessor has one, and for many, where a slice is wide so that less is done twice.
template <typename T, int D, int W, int Warps, int Blocks, int Ahead> SliceKernel slice_instance() {
    using S = Slice<D, W, Warps>;
    constexpr int32_t kSlots = Ahead * S::kSteps * S::kThreads * static_cast<int32_t>(sizeof(float4));
    return {reinterpret_cast<const void*>(slice_decode<T, S, Blocks, Ahead>), W, S::kThreads, Blocks, kSlots,
            kSlots + S::kStaticBytes};
}

template <typename T> SliceKernel slice_instance(int32_t head_dim, bool many) {
    constexpr bool kHalf = sizeof(T) == 2;  // float32 takes twice the registers for P: narrower slices
    switch (head_dim) {
        case 64: return many ? slice_instance<T, 64, 64, 4, 4, 1>() : slice_instance<T, 64, 64, 8, 2, 1>();
        case 80: return many ? slice_instance<T, 80, 80, 8, 2, 1>() : slice_instance<T, 80, 40, 5, 3, 1>();
        case 128:
            return many ? slice_instance<T, 128, kHalf ? 128 : 64, kHalf ? 4 : 8, 2, 1>()
                        : slice_instance<T, 128, 32, 8, 2, 1>();
        case 256:
            return many ? slice_instance<T, 256, kHalf ? 128 : 64, kHalf ? 8 : 16, 1, 1>()
                        : slice_instance<T, 256, 32, 8, 2, 1>();
        default: return {};
    }
}

}  // namespace decode
}  // namespace dijiang
