// Decode for the common head sizes on GPUs with thread-block clusters: DijiangAttention of one token per row.
//
// A head's state [D, D] is cut into column slices of W; a block owns one slice of one head at a time and keeps
// its slice of P, [D, W], in registers for as long as it lives. Per item:
//
//   each warp   turns D/8 elements of q and k (RoPE) and multiplies them with its rows of P's slice;
//   the block   sums the warps' parts to W logits of q and of k, and sends them to the head's other blocks;
//   each warp   softmax over all D logits, S' = a S + b phi(k) v and phi(q) S' on its D/8 rows, from registers;
//   the block   sums o, exchanges it if GroupNorm groups leave the slice, normalises, gates, stores.
//
// The state of the next item is requested as soon as this item's left its registers, and arrives while its
// features are computed. Nothing waits for the whole cluster: blocks send to mbarriers (cluster.cuh).
#pragma once

#include "decode/cluster.cuh"
#include "decode/internal.h"
#include "decode/norm.cuh"

namespace dijiang {
namespace decode {

template <int D_, int W_> struct Slice {
    static constexpr int D = D_, W = W_;
    static constexpr int kSplits = D / W;
    static constexpr int kQuads = W / 4;                           // float4 in a row of the slice
    static constexpr int kSubs = 32 / kQuads;                      // rows that a warp touches at once
    static constexpr int kRows = D / kWarps;                       // rows of a warp
    static constexpr int kSteps = (kRows + kSubs - 1) / kSubs;     // rows of a lane
    static constexpr int kTurned = (2 * kRows + 31) / 32;          // elements of q and k that a lane turns
    static constexpr int kLogits = (D + 31) / 32;                  // columns of the softmax of a lane
    static constexpr bool kFull = kQuads * kSubs == 32 && kRows % kSubs == 0;  // no lane or step is idle
    static_assert(D % kWarps == 0 && W % 4 == 0 && (2 * kRows <= 32 || kRows == 32), "untried shape");
};

// Sums N values over the lanes that share a column quad. Afterwards lane 0 of them, or with a power of two of
// them each lane, holds a part: `count` values starting at `start`.
template <int Quads, int Subs, int N> struct SubSum {
    static constexpr bool kPowerOfTwo = Quads * Subs == 32;
    static constexpr int kKept = kPowerOfTwo ? (N / Subs > 0 ? N / Subs : 1) : N;

    // Returns where the kept values start; negative if this lane keeps none.
    static __device__ __forceinline__ int run(float (&v)[N], int lane) {
        int start = 0;
        if constexpr (kPowerOfTwo) {
            int left = N;
#pragma unroll
            for (int offset = 16; offset >= Quads; offset /= 2) {
                const bool upper = (lane & offset) != 0;
                if (left > 1) {
                    left /= 2;
#pragma unroll
                    for (int i = 0; i < N / 2; ++i) {
                        if (i < left) {
                            const float given = upper ? v[i] : v[i + left];
                            const float kept = upper ? v[i + left] : v[i];
                            v[i] = kept + __shfl_xor_sync(~0u, given, offset);
                        }
                    }
                    start += upper ? left : 0;
                } else {
                    v[0] += __shfl_xor_sync(~0u, v[0], offset);
                    if (upper) start = -N;
                }
            }
        } else {
#pragma unroll
            for (int i = 0; i < N; ++i) {
                float sum = v[i];
#pragma unroll
                for (int sub = 1; sub < Subs; ++sub) sum += __shfl_down_sync(~0u, v[i], sub * Quads);
                v[i] = sum;
            }
            if (lane >= Quads) start = -N;
        }
        return start;
    }
};

// Four neighbouring elements.
template <typename T> struct alignas(4 * sizeof(T)) Quad {
    T x, y, z, w;
};

template <typename T> __device__ __forceinline__ float4 load_quad(const T* from) {
    const Quad<T> q = *reinterpret_cast<const Quad<T>*>(from);
    return {to_float(q.x), to_float(q.y), to_float(q.z), to_float(q.w)};
}

template <typename T, typename S, int Blocks, int Ahead>
__global__ void __launch_bounds__(kThreads, Blocks)
    slice_decode(const __grid_constant__ AttentionParams p, const __grid_constant__ SliceCut cut) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    constexpr int D = S::D, W = S::W, kRows = S::kRows, kSteps = S::kSteps, kSubs = S::kSubs;
    constexpr bool kExchange = S::kSplits > 1;
    constexpr int kMostClusterChannels = 8 * W;
    __shared__ alignas(16) float2 logits[2][D];  // (q, k); two sets, for this item and the next
    __shared__ alignas(16) float2 logit_parts[kWarps][W];
    __shared__ alignas(16) float output_parts[kWarps][W];
    __shared__ alignas(16) float raw[2][kMostClusterChannels];
    __shared__ alignas(16) float values[2][W];   // v
    __shared__ alignas(16) float2 affine[2][W];  // (weight, bias) of GroupNorm times the gate
    __shared__ alignas(16) float4 factors[2];    // e^a, b and r of the token
    __shared__ alignas(8) uint64_t logits_there[2], raw_there[2];
    extern __shared__ float4 slots[];  // states of the next items: each thread's own, touched by nobody else

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int quad = lane % S::kQuads, sub = lane / S::kQuads;
    const int rank = cluster_rank(), blocks = cut.heads * S::kSplits;
    const int split = rank % S::kSplits, first_peer = rank - split;
    const int items_per_row = p.num_heads / cut.heads;
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
    wait_for_previous_kernel();

    // Requested one item ahead: what starts an item. Requested `Ahead` items ahead: the state.
    float own[S::kTurned], partner[S::kTurned];
    int position = 0, valid = 0;
    const auto state_offset = [&](int head) {
        return (static_cast<int64_t>(head) * D + first_row + sub) * D + split * W + 4 * quad;
    };
    const int half = p.rotary_dim / 2;
    const auto request = [&](int item) {
        const int row = item / items_per_row;
        const int head = (item - row * items_per_row) * cut.heads + rank / S::kSplits;
        position = p.positions[row];
        valid = p.seq_lens[row];
        const T* qkv = static_cast<const T*>(p.qkv) + row * p.qkv_batch_stride;
        const T* query = qkv + head * D;
        const T* key = qkv + (p.num_heads + head / cut.sharing) * D;
#pragma unroll
        for (int i = 0; i < S::kTurned; ++i) {
            const int j = lane + 32 * i;
            const int at = first_row + j % kRows;
            const int other = at < half ? at + half : at < 2 * half ? at - half : at;
            const T* from = j < kRows ? query : key;
            own[i] = to_float(from[at]);
            partner[i] = to_float(from[other]);
        }
    };
    const auto request_state = [&](int item, float4* to) {
        if (item < cut.items) {
            const int row = item / items_per_row;
            const int head = (item - row * items_per_row) * cut.heads + rank / S::kSplits;
            const float* from = p.past_state + row * p.past_batch_stride + state_offset(head);
#pragma unroll
            for (int j = 0; j < kSteps; ++j) {
                if (holds(j)) copy_async(to + j * kThreads, from + j * kSubs * D);
            }
        }
        close_async();
    };

    const int stride = cluster_count();
    int item = cluster_index();
    float4* slot = slots + threadIdx.x;
    Turns turns[S::kTurned];
#pragma unroll
    for (int i = 0; i < S::kTurned; ++i) {
        const int at = first_row + (lane + 32 * i) % kRows;
        const bool turned = at < 2 * half;
        const float inv_freq = turned ? __ldg(p.inv_freq + (at < half ? at : at - half)) : 0.0f;
        // The first half of a pair subtracts the partner's sine: fold the sign into the angle.
        turns[i] = turns_per_token(at < half ? -inv_freq : inv_freq);
    }
    if (item < cut.items) request(item);
#pragma unroll
    for (int i = 0; i < Ahead; ++i) request_state(item + i * stride, slot + i * kSteps * kThreads);
    Quad<T> proj[kSteps];
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
        float4 x = {0.0f, 0.0f, 0.0f, 0.0f};
        const float* from = p.proj + (first_row + sub + j * kSubs) * D + split * W + 4 * quad;
        if (holds(j)) x = __ldg(reinterpret_cast<const float4*>(from));
        proj[j] = {from_float<T>(x.x), from_float<T>(x.y), from_float<T>(x.z), from_float<T>(x.w)};
    }

    const auto next = [&]() {  // this item's slot is free, and its q and k are used
        request_state(item + Ahead * stride, slot);
        if (Ahead > 1) slot = slot == slots + threadIdx.x + (Ahead - 1) * kSteps * kThreads ? slots + threadIdx.x : slot + kSteps * kThreads;
        if (item + stride < cut.items) request(item + stride);
    };
    bool met = blocks == 1;  // whether the whole cluster is known to run
    uint32_t used = 0;       // items that sent anything: selects buffers and phases
    for (; item < cut.items; item += stride) {
        const int row = item / items_per_row;
        const int head = (item - row * items_per_row) * cut.heads + rank / S::kSplits;
        T* output = static_cast<T*>(p.output) + row * p.output_batch_stride;
        float* const present = p.present_state + row * p.present_batch_stride + state_offset(head);
        if (valid <= 0) {
            wait_async<Ahead - 1>();
            if (p.present_state != p.past_state) {
#pragma unroll
                for (int j = 0; j < kSteps; ++j) {
                    if (holds(j)) __stcg(reinterpret_cast<float4*>(present + j * kSubs * D), slot[j * kThreads]);
                }
            }
            if (threadIdx.x < W) output[head * D + split * W + threadIdx.x] = from_float<T>(0.0f);
            next();
            continue;
        }

        // Everything else that the item needs is requested before the first wait.
        const int in_set = head % cut.set_heads;  // this block's channels in its head set
        const int set_start = (head - in_set) * D, begin = in_set * D + split * W;
        if (threadIdx.x == kThreads - 1) {
            const Terms terms = token_terms(p, head, position);
            factors[used & 1] = {expf(terms.log_decay), terms.gain, terms.read_scale, 0.0f};
        }
        float value = 0.0f, opening = 0.0f, weight = 0.0f, bias = 0.0f;
        if (threadIdx.x < W) {
            const int kv_head = head / cut.sharing, column = split * W + threadIdx.x;
            value = to_float(static_cast<const T*>(p.qkv)[row * p.qkv_batch_stride +
                                                          (p.num_heads + p.num_kv_heads + kv_head) * D + column]);
            opening = to_float(static_cast<const T*>(p.gate)[row * p.gate_batch_stride + head * D + column]);
            weight = __ldg(p.norm_weight + head * D + column);
            bias = __ldg(p.norm_bias + head * D + column);
        }
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
            rotary_cos_sin(rotary_turn(turns[i], static_cast<float>(position)), cosine, sine);
            u[i] = own[i] * cosine + partner[i] * sine;
        }
        float acc[8] = {};  // 4 columns of (q, k)
#pragma unroll
        for (int j = 0; j < kSteps; ++j) {
            const int local = sub + j * kSubs;
            const float q = __shfl_sync(~0u, u[0], local & 31);
            const float k = kRows == 32 ? __shfl_sync(~0u, u[S::kTurned - 1], local & 31)
                                        : __shfl_sync(~0u, u[0], (kRows + local) & 31);
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
            opening = silu(opening);
            values[buffer][threadIdx.x] = value;
            affine[buffer][threadIdx.x] = {weight * opening, bias * opening};
        }
        if (!met) {
            cluster_wait();
            met = true;
        }
        __syncthreads();
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

        // Softmax: every warp finds the maxima and sums of all D logits, and the features of its own rows.
        float2 all[S::kLogits];
        float2 most = {-INFINITY, -INFINITY};
#pragma unroll
        for (int i = 0; i < S::kLogits; ++i) {
            const int at = lane + 32 * i;
            all[i] = (D % 32 == 0 || at < D) ? logits[buffer][at] : make_float2(-INFINITY, -INFINITY);
            most.x = fmaxf(most.x, all[i].x);
            most.y = fmaxf(most.y, all[i].y);
        }
        most.x = warp_max(most.x);
        most.y = warp_max(most.y);
        float2 total = {0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < S::kLogits; ++i) {
            total.x += exp2f((all[i].x - most.x) * kLog2E);
            total.y += exp2f((all[i].y - most.y) * kLog2E);
        }
        float2 features[kSteps];  // not yet divided by their sums
#pragma unroll
        for (int j = 0; j < kSteps; ++j) {
            const int local = sub + j * kSubs;
            const float2 x = logits[buffer][first_row + (S::kFull || local < kRows ? local : 0)];
            features[j] = {exp2f((x.x - most.x) * kLog2E), exp2f((x.y - most.y) * kLog2E)};
        }
        total.x = warp_sum(total.x);
        total.y = warp_sum(total.y);

        // S' and phi(q) S' on this warp's rows.
        const float4 terms = factors[buffer];
        const float fade = terms.x, write = terms.y / total.y, read = terms.z / total.x;
        const float4 v = *reinterpret_cast<const float4*>(&values[buffer][4 * quad]);
        float o[4] = {};
        wait_async<Ahead - 1>();
#pragma unroll
        for (int j = 0; j < kSteps; ++j) {
            if (holds(j)) {
                const float b = write * features[j].y, q = features[j].x;
                float4 s = slot[j * kThreads];
                s.x = fmaf(fade, s.x, b * v.x);
                s.y = fmaf(fade, s.y, b * v.y);
                s.z = fmaf(fade, s.z, b * v.z);
                s.w = fmaf(fade, s.w, b * v.w);
                __stcg(reinterpret_cast<float4*>(present + j * kSubs * D), s);
                o[0] = fmaf(q, s.x, o[0]);
                o[1] = fmaf(q, s.y, o[1]);
                o[2] = fmaf(q, s.z, o[2]);
                o[3] = fmaf(q, s.w, o[3]);
            }
        }
        next();
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
            float* workspace = static_cast<float*>(p.workspace) + static_cast<int64_t>(row) * p.num_heads * D;
            if (threadIdx.x < W) workspace[set_start + begin + threadIdx.x] = whole(threadIdx.x);
            const int set = head / cut.set_heads;
            if (arrives_last(p.sync + row * (p.num_heads / cut.set_heads) + set, cut.set_heads * S::kSplits)) {
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
        const int first_group = begin / p.num_heads, last_group = (begin + W - 1) / p.num_heads;
#pragma unroll 1
        for (int group = first_group + warp; group <= last_group; group += kWarps) {
            const int base = group * p.num_heads;
            normalise_group(
                p.num_heads, p.epsilon,
                [&](int c) { return cut.norm == Norm::cluster ? raw[buffer][base + c] : whole(base + c - begin); },
                [&](int c, float y) {
                    const int x = base + c;
                    if (x < begin || x >= begin + W) return;
                    const float2 line = affine[buffer][x - begin];
                    output[set_start + x] = from_float<T>(fmaf(y, line.x, line.y));
                });
        }
    }
    if (!met) cluster_wait();
#endif
}

// The instances of one element type: one width per head size, as measured best on an H200.
template <typename T, int D, int W, int Blocks, int Ahead> SliceKernel slice_instance() {
    using S = Slice<D, W>;
    return {reinterpret_cast<const void*>(slice_decode<T, S, Blocks, Ahead>), W, Blocks,
            Ahead * S::kSteps * kThreads * static_cast<int32_t>(sizeof(float4))};
}

template <typename T> SliceKernel slice_instance(int32_t head_dim) {
    switch (head_dim) {
        case 64: return slice_instance<T, 64, 64, 3, 2>();
        case 80: return slice_instance<T, 80, 40, 3, 2>();
        case 128: return slice_instance<T, 128, 32, 3, 2>();
        case 256: return slice_instance<T, 256, 32, 2, 2>();
        default: return {};
    }
}

}  // namespace decode
}  // namespace dijiang
