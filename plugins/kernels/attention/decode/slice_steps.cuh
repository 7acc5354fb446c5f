// The steps of the slice kernel (slice.cuh), in the order in which an item passes them.
#pragma once

#include "attention/decode/norm.cuh"
#include "attention/decode/slice_place.cuh"
#include "attention/rotary.cuh"
#include "attention/terms.cuh"
#include "device/elements.cuh"
#include "device/math.cuh"

namespace dijiang {
namespace decode {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// A row to be turned, in a head whose first `half` dimensions are turned with the next `half`.
struct TurnedRow {
    int row, half;

    // The element that it is turned with.
    __device__ __forceinline__ int partner() const {
        return row < half ? row + half : row < 2 * half ? row - half : row;
    }
    // The angle. The first half of a pair subtracts the partner's sine: its sign is in the angle.
    __device__ __forceinline__ Turns turns(const AttentionParams& p) const {
        if (row >= 2 * half) return {0.0f, 0.0f};
        const float inv_freq = __ldg(p.inv_freq + (row < half ? row : row - half));
        return turns_per_token(row < half ? -inv_freq : inv_freq);
    }
};

// Requested one item ahead, and not touched before it is needed: elements of q and k and their partners, and by
// the first W threads a column's value, gate and affine.
template <typename T, typename S> struct SliceInputs {
    T own[S::kTurned], partner[S::kTurned], value = T(), opening = T();
    float weight = 0.0f, bias = 0.0f;
    int position = 0, valid = 0;

    __device__ __forceinline__ void request(const AttentionParams& p, const SliceCut& cut, const SliceThread<S>& at,
                                            const TurnedRow& turned, const Item& item) {
        constexpr int D = S::D, W = S::W;
        const int row = item.row, head = item.head;
        position = p.positions[row];
        valid = p.seq_lens[row];
        const T* qkv = static_cast<const T*>(p.qkv) + row * p.qkv_batch_stride;
        const int kv_head = cut.sharing.quotient(head), key = (p.num_heads + kv_head) * D;
        const int other = turned.partner();
#pragma unroll
        for (int i = 0; i < S::kTurned; ++i) {
            const T* from = qkv + (i == 0 && (S::kTurned == 2 || at.lane < S::kRows) ? head * D : key);
            own[i] = from[turned.row];
            partner[i] = from[other];
        }
        if (threadIdx.x < W) {
            const int column = head * D + at.split * W + threadIdx.x;
            value = qkv[key + p.num_kv_heads * D + at.split * W + threadIdx.x];
            opening = static_cast<const T*>(p.gate)[row * p.gate_batch_stride + column];
            weight = __ldg(p.norm_weight + column);
            bias = __ldg(p.norm_bias + column);
        }
    }

    // RoPE on this lane's elements: u of q, and of k in the last.
    __device__ __forceinline__ void turn(Turns turns, float (&u)[S::kTurned]) const {
#pragma unroll
        for (int i = 0; i < S::kTurned; ++i) {
            float cosine, sine;
            rotary_cos_sin(rotary_turn(turns, static_cast<float>(position)), cosine, sine);
            u[i] = to_float(own[i]) * cosine + to_float(partner[i]) * sine;
        }
    }

    // What the first W threads keep for the block until this item's end.
    __device__ __forceinline__ void keep(const SliceMemory<S>& memory, uint32_t buffer) const {
        if (threadIdx.x < S::W) {
            const float gate = silu(to_float(opening));
            memory.values[buffer][threadIdx.x] = to_float(value);
            memory.affine[buffer][threadIdx.x] = {weight * gate, bias * gate};
        }
    }
};

// P's slice: this thread's quads of it.
template <typename S>
__device__ __forceinline__ void request_proj(const AttentionParams& p, const SliceThread<S>& at, uint32_t first_entry,
                                             float4 (&columns)[S::kSteps]) {
#pragma unroll
    for (int j = 0; j < S::kSteps; ++j) {
        columns[j] = {0.0f, 0.0f, 0.0f, 0.0f};
        const float* from = p.proj + first_entry + j * S::kSubs * S::D;
        if (at.holds(j)) columns[j] = __ldg(reinterpret_cast<const float4*>(from));
    }
}
template <typename T, int kSteps>
__device__ __forceinline__ void round_proj(const float4 (&columns)[kSteps], Quad<T> (&proj)[kSteps]) {
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
        proj[j] = {from_float<T>(columns[j].x), from_float<T>(columns[j].y), from_float<T>(columns[j].z),
                   from_float<T>(columns[j].w)};
    }
}

// u P on this warp's rows: its part of the logits, for the block.
template <typename T, typename S>
__device__ __forceinline__ void project(const SliceMemory<S>& memory, const SliceThread<S>& at,
                                        const Quad<T> (&proj)[S::kSteps], const float (&u)[S::kTurned]) {
    float acc[8] = {};  // 4 columns of (q, k)
#pragma unroll
    for (int j = 0; j < S::kSteps; ++j) {
        const int local = at.sub + j * S::kSubs;
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
    using Sum = SubSum<S::kQuads, S::kSubs, 8>;
    const int start = Sum::run(acc, at.lane);
    float* to = reinterpret_cast<float*>(memory.logit_parts[at.warp]) + 8 * at.quad + start;
    if (start >= 0) {
#pragma unroll
        for (int i = 0; i < Sum::kKept; ++i) to[i] = acc[i];
    }
}

// The warps' parts become the slice's logits, which all blocks of the head get; then all D of them are here.
template <typename S>
__device__ __forceinline__ void meet_logits(const SliceMemory<S>& memory, const SliceThread<S>& at, uint32_t buffer,
                                            uint32_t parity) {
    constexpr int W = S::W;
#pragma unroll 1
    for (int i = threadIdx.x; i < W * S::kSplits; i += S::kThreads) {
        const int column = i % W;
        float2 sum = {0.0f, 0.0f};
#pragma unroll
        for (int w = 0; w < S::kWarps; ++w) {
            sum.x += memory.logit_parts[w][column].x;
            sum.y += memory.logit_parts[w][column].y;
        }
        float2* to = &memory.logits[buffer][at.split * W + column];
        if (S::kExchange) {
            const int peer = at.first_peer + i / W;
            send_to(address_in_block(to, peer), sum, address_in_block(&memory.logits_there[buffer], peer));
        } else {
            *to = sum;
        }
    }
    if (S::kExchange) {
        await_arrival(&memory.logits_there[buffer], parity);
    } else {
        __syncthreads();
    }
}

// What the features of q and of k are still to be divided by.
struct FeatureSums {
    float query, key;
};

// Softmax: every warp finds the maxima and sums of all D logits, of q in its lower and of k in its upper half, and
// leaves the features of its own rows.
template <typename S>
__device__ __forceinline__ FeatureSums softmax(const SliceThread<S>& at, const float2 (&logits)[S::D],
                                               float2 (&features)[S::D]) {
    const float* half_logits = reinterpret_cast<const float*>(logits + at.lane % 16) + at.lane / 16;
    float mine[S::kLogits], most = -INFINITY, total = 0.0f;
#pragma unroll
    for (int i = 0; i < S::kLogits; ++i) {
        mine[i] = half_logits[32 * i];
        most = fmaxf(most, mine[i]);
    }
#pragma unroll
    for (int offset = 8; offset > 0; offset /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, offset));
    const float other_most = __shfl_xor_sync(~0u, most, 16);
    const float2 most_of = at.lane < 16 ? make_float2(most, other_most) : make_float2(other_most, most);
#pragma unroll
    for (int i = 0; i < S::kLogits; ++i) total += fast_exp2((mine[i] - most) * kLog2E);
    if (at.lane < S::kRows) {
        const float2 x = logits[at.first_row + at.lane];
        features[at.first_row + at.lane] = {fast_exp2((x.x - most_of.x) * kLog2E),
                                            fast_exp2((x.y - most_of.y) * kLog2E)};
    }
#pragma unroll
    for (int offset = 8; offset > 0; offset /= 2) total += __shfl_xor_sync(~0u, total, offset);
    const float other_total = __shfl_xor_sync(~0u, total, 16);
    const FeatureSums sums = {at.lane < 16 ? total : other_total, at.lane < 16 ? other_total : total};
    __syncwarp();
    return sums;
}

// This warp's part of the outputs, for the block.
template <typename S>
__device__ __forceinline__ void keep_output(const SliceMemory<S>& memory, const SliceThread<S>& at, float (&o)[4]) {
    using Sum = SubSum<S::kQuads, S::kSubs, 4>;
    const int start = Sum::run(o, at.lane);
    if (start >= 0) {
#pragma unroll
        for (int i = 0; i < Sum::kKept; ++i) memory.output_parts[at.warp][4 * at.quad + start + i] = o[i];
    }
}

// A column's output before GroupNorm.
template <typename S>
__device__ __forceinline__ float whole_output(const SliceMemory<S>& memory, int column, float read) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < S::kWarps; ++w) sum += memory.output_parts[w][column];
    return sum * read;
}

// GroupNorm and gate where a group has more channels than a cluster: through the workspace.
template <typename T, typename S>
__device__ __forceinline__ void finish_in_memory(const AttentionParams& p, const SliceCut& cut,
                                                 const SliceMemory<S>& memory, const Item& item, int start,
                                                 float read) {
    float* raw_outputs = static_cast<float*>(p.workspace) + static_cast<int64_t>(item.row) * p.num_heads * S::D;
    if (threadIdx.x < S::W) raw_outputs[start + threadIdx.x] = whole_output(memory, threadIdx.x, read);
    const int set = item.head / cut.set_heads, sets = p.num_heads / cut.set_heads;
    if (arrives_last(p.sync + item.row * sets + set, cut.set_heads * S::kSplits)) {
        finish_set<T>(p, item.row, set, cut.set_heads * S::D);
    }
}

// The outputs of all of the cluster's blocks are here before GroupNorm.
template <typename S>
__device__ __forceinline__ void meet_outputs(const SliceMemory<S>& memory, const SliceThread<S>& at, float read,
                                             uint32_t buffer, uint32_t parity) {
    constexpr int W = S::W;
#pragma unroll 1
    for (int i = threadIdx.x; i < W * at.blocks; i += S::kThreads) {
        const int peer = i / W;
        send_to(address_in_block(&memory.raw[buffer][at.rank * W + i % W], peer), whole_output(memory, i % W, read),
                address_in_block(&memory.raw_there[buffer], peer));
    }
    await_arrival(&memory.raw_there[buffer], parity);
}

// This block's channels in its head set, and the groups that they belong to.
struct SliceGroups {
    int begin, first, last;

    template <typename S>
    static __device__ __forceinline__ SliceGroups of(const SliceCut& cut, const SliceThread<S>& at) {
        const int begin = (cut.norm == Norm::cluster ? at.rank : at.split) * S::W;
        return {begin, cut.channels.quotient(begin), cut.channels.quotient(begin + S::W - 1)};
    }
};

// GroupNorm of the block's channels, a warp a group: as normalise_group, with channels of the head set.
template <typename S, typename Get, typename Put>
__device__ __forceinline__ void normalise_groups(const AttentionParams& p, const SliceCut& cut,
                                                 const SliceThread<S>& at, const SliceGroups& groups, Get get,
                                                 Put put) {
#pragma unroll 1
    for (int group = groups.first + at.warp; group <= groups.last; group += S::kWarps) {
        const int base = group * p.num_heads;
        normalise_group(
            p.num_heads, cut.inverse_channels, p.epsilon, [&](int c) { return get(base + c); },
            [&](int c, float y) { put(base + c, y); });
    }
}

#endif

}  // namespace decode
}  // namespace dijiang
