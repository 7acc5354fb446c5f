// Decode for every head size and GPU: DijiangAttention of one token per row.
//
// A block serves one head of one row at a time, or one of `splits` parts of its value columns; with few items
// more blocks then share a head, each computing all of its features. P lies in shared memory, as T, if a
// block serves several items. The state streams through a ring of shared memory in which every thread has
// places of its own, so that it needs no barriers, and runs ahead across items while features are computed.
#include "attention/decode/cut.h"
#include "attention/decode/norm.cuh"
#include "attention/rotary.cuh"
#include "attention/terms.cuh"
#include "device/copies.cuh"
#include "device/elements.cuh"
#include "device/math.cuh"
#include "device/overlap.cuh"

namespace dijiang {
namespace decode {
namespace {

constexpr int kThreads = kStreamThreads, kWarps = kThreads / 32;
constexpr int kStages = 8;                   // float4 of each thread that are under way
constexpr int kParts = 8 * kThreads;         // floats: partial sums of 2 d logits by 256 / (d/4) threads each
constexpr int kMostDim = 256;

template <typename T> __device__ __forceinline__ float4 load_quad(const T* from) {
    struct alignas(4 * sizeof(T)) Quad { T x, y, z, w; };
    const Quad q = *reinterpret_cast<const Quad*>(from);
    return {to_float(q.x), to_float(q.y), to_float(q.z), to_float(q.w)};
}

template <typename T> __device__ __forceinline__ float4 round_quad(float4 x) {
    return {to_float(from_float<T>(x.x)), to_float(from_float<T>(x.y)), to_float(from_float<T>(x.z)),
            to_float(from_float<T>(x.w))};
}

// What one block works on.
struct Item {
    int row, head, split;
};

__device__ __forceinline__ Item item_at(const AttentionParams& p, const StreamCut& cut, int index) {
    const int unit = index / cut.splits;
    const int row = unit / p.num_heads;
    return {row, unit - row * p.num_heads, index - unit * cut.splits};
}

// q and k of an item after RoPE, to u[0..d) and u[d..2d).
template <typename T>
__device__ __forceinline__ void turn(const AttentionParams& p, const Item& item, float position, float* u) {
    const int d = p.head_dim, half = p.rotary_dim / 2;
    const T* qkv = static_cast<const T*>(p.qkv) + item.row * p.qkv_batch_stride;
    const T* query = qkv + item.head * d;
    const T* key = qkv + (p.num_heads + item.head / (p.num_heads / p.num_kv_heads)) * d;
    for (int i = threadIdx.x; i < 2 * d; i += kThreads) {
        const int at = i < d ? i : i - d;
        const T* from = i < d ? query : key;
        float x = to_float(from[at]);
        if (at < 2 * half) {
            const float partner = to_float(from[at < half ? at + half : at - half]);
            float cosine, sine;
            const Turns turns = turns_per_token(__ldg(p.inv_freq + (at < half ? at : at - half)));
            rotary_cos_sin(rotary_turn(turns, position), cosine, sine);
            x = x * cosine + (at < half ? -partner : partner) * sine;
        }
        u[i] = x;
    }
}

// This thread's share of the logits: rows `first`, `first + stride`, ... of 4 columns of P, for q and k.
template <typename Load>
__device__ __forceinline__ void multiply(int d, int first, int stride, const float* u, Load load,
                                         float* parts) {
    float4 q = {0.0f, 0.0f, 0.0f, 0.0f}, k = q;
#pragma unroll 4
    for (int i = first; i < d; i += stride) {
        const float4 column = load(i);
        const float a = u[i], b = u[d + i];
        q.x = fmaf(a, column.x, q.x);
        q.y = fmaf(a, column.y, q.y);
        q.z = fmaf(a, column.z, q.z);
        q.w = fmaf(a, column.w, q.w);
        k.x = fmaf(b, column.x, k.x);
        k.y = fmaf(b, column.y, k.y);
        k.z = fmaf(b, column.z, k.z);
        k.w = fmaf(b, column.w, k.w);
    }
    *reinterpret_cast<float4*>(parts) = q;
    *reinterpret_cast<float4*>(parts + d) = k;
}

// One warp turns d logits into features.
__device__ __forceinline__ void softmax(float* x, int d) {
    const int lane = threadIdx.x % 32;
    float most = -INFINITY;
    for (int i = lane; i < d; i += 32) most = fmaxf(most, x[i]);
    most = warp_max(most);
    float sum = 0.0f;
    for (int i = lane; i < d; i += 32) {
        const float e = fast_exp2((x[i] - most) * kLog2E);
        x[i] = e;
        sum += e;
    }
    const float inverse = 1.0f / warp_sum(sum);
    for (int i = lane; i < d; i += 32) x[i] *= inverse;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    stream_decode(const __grid_constant__ AttentionParams p, const __grid_constant__ StreamCut cut) {
    extern __shared__ float4 shared[];
    __shared__ alignas(16) float u[2 * kMostDim];
    __shared__ alignas(16) float features[2 * kMostDim];  // logits, then phi(q) and phi(k)
    __shared__ alignas(16) float parts[kParts];           // partial sums: of logits, later of the output
    float4* const ring = shared + threadIdx.x;
    T* const held = reinterpret_cast<T*>(shared + kStages * kThreads);

    let_next_kernel_start();
    wait_for_previous_kernel();

    const int d = p.head_dim, width = d / cut.splits;
    // The thread's place in P (4 of d columns) and in the state (4 of `width` columns).
    const int wide = d / 4, wide_rows = kThreads / wide;
    const int wide_quad = threadIdx.x % wide, wide_row = threadIdx.x / wide;
    const int quads = width / 4, rows = kThreads / quads;
    const int quad = threadIdx.x % quads, first_row = threadIdx.x / quads;
    const int steps = (d + rows - 1) / rows;

    // Requests the state ahead of its use: one float4 of each thread per call, through all items.
    int ahead_item = blockIdx.x, ahead_step = 0, ahead_place = 0;
    const float* ahead = nullptr;
    const auto request = [&]() {
        if (ahead_item < cut.items) {
            if (ahead_step == 0) {
                const Item item = item_at(p, cut, ahead_item);
                ahead = p.past_state + item.row * p.past_batch_stride +
                        static_cast<int64_t>(item.head) * d * d + item.split * width + 4 * quad;
            }
            const int row = first_row + ahead_step * rows;
            if (first_row < rows && row < d) {
                copy_async_256(ring + ahead_place * kThreads, ahead + row * d);
            }
            ahead_place = (ahead_place + 1) % kStages;
            if (++ahead_step == steps) {
                ahead_step = 0;
                ahead_item += gridDim.x;
            }
        }
        commit_copies();
    };
    for (int i = 0; i < kStages; ++i) request();

    if (cut.resident) {
        for (int i = threadIdx.x; i < d * wide; i += kThreads) {
            const float4 x = __ldg(reinterpret_cast<const float4*>(p.proj) + i);
            T* to = held + 4 * i;
            to[0] = from_float<T>(x.x);
            to[1] = from_float<T>(x.y);
            to[2] = from_float<T>(x.z);
            to[3] = from_float<T>(x.w);
        }
    }

    int place = 0;  // of the ring
    for (int index = blockIdx.x; index < cut.items; index += gridDim.x) {
        const Item item = item_at(p, cut, index);
        const int position = p.positions[item.row];
        const bool valid = p.seq_lens[item.row] > 0;
        T* const output = static_cast<T*>(p.output) + item.row * p.output_batch_stride;
        float* const present = p.present_state + item.row * p.present_batch_stride +
                               static_cast<int64_t>(item.head) * d * d + item.split * width + 4 * quad;
        const int begin = item.head * d + item.split * width;  // the block's channels: begin .. begin + width

        if (!valid) {
            for (int step = 0; step < steps; ++step) {
                wait_copies<kStages - 1>();
                const int row = first_row + step * rows;
                if (p.present_state != p.past_state && first_row < rows && row < d) {
                    __stcg(reinterpret_cast<float4*>(present + row * d), ring[place * kThreads]);
                }
                place = (place + 1) % kStages;
                request();
            }
            if (static_cast<int>(threadIdx.x) < width) output[begin + threadIdx.x] = from_float<T>(0.0f);
            continue;
        }

        const Terms terms = token_terms(p, item.head, position);
        const int kv_head = item.head / (p.num_heads / p.num_kv_heads);
        const float4 v =
            load_quad(static_cast<const T*>(p.qkv) + item.row * p.qkv_batch_stride +
                      (p.num_heads + p.num_kv_heads + kv_head) * d + item.split * width + 4 * quad);
        turn<T>(p, item, static_cast<float>(position), u);
        __syncthreads();
        if (wide_row < wide_rows) {
            float* to = parts + wide_row * 2 * d + 4 * wide_quad;
            if (cut.resident) {
                const T* from = held + 4 * wide_quad;
                multiply(d, wide_row, wide_rows, u, [&](int i) { return load_quad(from + i * d); }, to);
            } else {
                const float* from = p.proj + 4 * wide_quad;
                const auto load = [&](int i) {
                    return round_quad<T>(__ldg(reinterpret_cast<const float4*>(from + i * d)));
                };
                multiply(d, wide_row, wide_rows, u, load, to);
            }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < 2 * d; i += kThreads) {
            float sum = 0.0f;
            for (int part = 0; part < wide_rows; ++part) sum += parts[part * 2 * d + i];
            features[i] = sum;
        }
        __syncthreads();
        if (threadIdx.x < 64) softmax(features + threadIdx.x / 32 * d, d);
        __syncthreads();

        const float fade = expf(terms.log_decay);
        float4 o = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 2
        for (int step = 0; step < steps; ++step) {
            wait_copies<kStages - 1>();
            const int row = first_row + step * rows;
            if (first_row < rows && row < d) {
                float4 s = ring[place * kThreads];
                const float q = features[row], k = terms.gain * features[d + row];
                s.x = fmaf(fade, s.x, k * v.x);
                s.y = fmaf(fade, s.y, k * v.y);
                s.z = fmaf(fade, s.z, k * v.z);
                s.w = fmaf(fade, s.w, k * v.w);
                __stcg(reinterpret_cast<float4*>(present + row * d), s);
                o.x = fmaf(q, s.x, o.x);
                o.y = fmaf(q, s.y, o.y);
                o.z = fmaf(q, s.z, o.z);
                o.w = fmaf(q, s.w, o.w);
            }
            place = (place + 1) % kStages;
            request();
        }
        if (first_row < rows) *reinterpret_cast<float4*>(parts + first_row * width + 4 * quad) = o;
        __syncthreads();
        const auto whole = [&](int column) {
            float sum = 0.0f;
            for (int part = 0; part < rows; ++part) sum += parts[part * width + column];
            return sum * terms.read_scale;
        };

        if (cut.norm == Norm::memory) {
            float* raw = static_cast<float*>(p.workspace) + static_cast<int64_t>(item.row) * p.num_heads * d;
            if (static_cast<int>(threadIdx.x) < width) raw[begin + threadIdx.x] = whole(threadIdx.x);
            const int set = item.head / cut.set_heads, sets = p.num_heads / cut.set_heads;
            if (arrives_last(p.sync + item.row * sets + set, cut.set_heads * cut.splits)) {
                finish_set<T>(p, item.row, set, cut.set_heads * d);
            }
            continue;
        }
        // `width` is a multiple of the groups' H channels. Features are used up, so that the sums find place
        // there; each is read by the lane that wrote it.
        const T* gate = static_cast<const T*>(p.gate) + item.row * p.gate_batch_stride + begin;
        for (int group = threadIdx.x / 32; group < width / p.num_heads; group += kWarps) {
            const int base = group * p.num_heads;
            for (int c = threadIdx.x % 32; c < p.num_heads; c += 32) features[base + c] = whole(base + c);
            normalise_group(
                p.num_heads, 1.0f / p.num_heads, p.epsilon, [&](int c) { return features[base + c]; },
                [&](int c, float y) {
                    const int x = base + c;
                    const float weight = __ldg(p.norm_weight + begin + x);
                    const float normed = fmaf(y, weight, __ldg(p.norm_bias + begin + x));
                    output[begin + x] = from_float<T>(normed * silu(to_float(gate[x])));
                });
        }
    }
}

}  // namespace

const void* stream_kernel(int32_t dtype) {
    switch (dtype) {
        case DIJIANG_FLOAT16: return reinterpret_cast<const void*>(stream_decode<__half>);
        case DIJIANG_BFLOAT16: return reinterpret_cast<const void*>(stream_decode<__nv_bfloat16>);
        default: return reinterpret_cast<const void*>(stream_decode<float>);
    }
}

int32_t stream_shared_memory(int32_t dtype, int32_t head_dim, bool resident) {
    const int32_t element = dtype == DIJIANG_FLOAT32 ? 4 : 2;
    const int32_t ring = kStages * kThreads * static_cast<int32_t>(sizeof(float4));
    return ring + (resident ? element * head_dim * head_dim : 0);
}

}  // namespace decode
}  // namespace dijiang
