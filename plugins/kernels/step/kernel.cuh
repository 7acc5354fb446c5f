// A decoding step in one launch: every block walks all layers with its share of the rows of every matrix.
//
//   residual stream -> norms -> q, k, v, gate and the MLP's first product -> attention -> the MLP's second product and
//   dense -> residual stream, and in the end the head; without parallel residual one after the other.
//
// Slots are written again a layer later, when nobody reads the last value any more: whoever gets there had values of this
// layer from every block that read those of the last one, sent after it had met behind the reading. A block reads only
// what it has rows for, and has met once more before it sends anything that follows from it.
#pragma once

#include "step/attention.cuh"

namespace dijiang {
namespace step {

// A layer's biases at this thread's first output of each matrix, asked for early.
struct Bias {
    const int64_t& place;  // among the layer's constants
    const int matrix;
    float first;

    template <typename T, int R>
    __device__ __forceinline__ Bias(const Context<T, R>& c, int m, const int64_t& where) : place(where), matrix(m) {
        const int v = threadIdx.x >> c.facts().lanes_shift[matrix], mine = v / (R * kGroup) * kGroup + v % kGroup;
        first = mine < c.groups(matrix) * kGroup ? load(c, mine) : 0.0f;
    }
    template <typename T, int R>
    __device__ __forceinline__ float at(const Context<T, R>& c, int group, int row, int output) const {
        const int v = threadIdx.x >> c.facts().lanes_shift[matrix];
        return v == (group * R + row) * kGroup + output ? first : load(c, group * kGroup + output);
    }

private:
    template <typename C> __device__ __forceinline__ float load(const C& c, int row) const {
        return __ldg(c.constant(place) + c.first_group(matrix) * kGroup + row);
    }
};

// q, k, v and gate: this block's rows of them, to whoever has the head.
template <typename T, int R> __device__ __forceinline__ void first_product(Context<T, R>& c, const Bias& bias) {
    uint2* slots = c.template in_sync<uint2>(c.p.exchange.qkvg) + c.first_group(kAttention) * kGroup;
    const int64_t all = c.p.layout.qkv() + c.p.layout.width();
    rows_of(c, kAttention, c.template in_shared<T>(c.p.memory.x1),
            [&](bool there, int group, int row, int output, float sum, int) {
                if (there)
                    put(slots + row * all + group * kGroup + output,
                        __float_as_uint(sum + bias.at(c, group, row, output)), c.tag);
            });
}

// The MLP's inner values, in pairs.
template <typename T, int R> __device__ __forceinline__ void up_product(Context<T, R>& c, const Bias& bias, const T* x) {
    const Params& p = c.p;
    const bool gated = p.layout.gated != 0;
    const int values = gated ? kGroup / 2 : kGroup, first = c.first_group(kUp) * values;
    uint2* slots = c.template in_sync<uint2>(p.exchange.up);
    rows_of(c, kUp, x, [&](bool there, int group, int row, int output, float sum, int shift) {
        const float y = sum + (there ? bias.at(c, group, row, output) : 0.0f);
        const float opened = gated ? __shfl_down_sync(~0u, y, kGroup / 2 << shift) : 0.0f;
        const float one = activate(p.activation, y, opened), next = __shfl_down_sync(~0u, one, 1 << shift);
        if (there && output % 2 == 0 && output < values)
            put(slots + (int64_t{row} * p.layout.inner + first + group * values + output) / 2, pack<T>(one, next), c.tag);
    });
}

// All of the MLP's inner values, four at a time, to where the product reads them.
template <typename T, int R> __device__ __forceinline__ void take_up(Context<T, R>& c) {
    constexpr int kAtOnce = 4;
    const Params& p = c.p;
    const int fours = p.layout.inner / 4, total = R * fours;
    const uint2* slots = c.template in_sync<uint2>(p.exchange.up);
    T* x = c.template in_shared<T>(p.memory.up);
    for (int start = threadIdx.x; start < total; start += kAtOnce * kThreads) {
        uint4 v[kAtOnce];
        await([&] {
            bool there = true;
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const int at = start + i * kThreads;
                if (at >= total) continue;
                v[i] = look_at_two(slots + 2 * at);
                there &= v[i].y == c.tag && v[i].w == c.tag;
            }
            return there;
        });
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int at = start + i * kThreads, row = R == 1 ? 0 : at / fours;
            if (at < total)
                *reinterpret_cast<uint2*>(x + x_index<R>(row, 4 * (at - row * fours))) = make_uint2(v[i].x, v[i].z);
        }
    }
    meet();
}

template <typename T, int R> struct Layer {
    StatePart<R> ahead;  // of this block's first item

    // x + attention(norm x) + mlp(norm' x)
    __device__ __forceinline__ void parallel(Context<T, R>& c, int layer) {
        const Params& p = c.p;
        const Affine norm(c, p.places.attention_norm, p.layout.hidden, RowShare<R>().mine);
        const Affine other(c, p.places.mlp_norm, p.layout.hidden, RowShare<R>().mine);
        const Bias attention_bias(c, kAttention, p.places.attention_bias), up_bias(c, kUp, p.places.up_bias);
        request_state(p, layer);
        if (c.groups(kAttention) + c.groups(kUp) > 0) take_normalised(c, layer == 0 ? 0 : c.tag - 1, norm, &other);
        first_product(c, attention_bias);
        up_product(c, up_bias, c.template in_shared<T>(p.memory.x2));
        const Affine group_norm(c, p.places.group_norm, p.layout.width(), threadIdx.x);
        const Bias dense_bias(c, kDense, p.places.dense_bias), down_bias(c, kDown, p.places.down_bias);
        attention(c, layer, ahead);
        const int groups = c.groups(kDown);
        if (groups == 0) return;
        const Cut &down_cut = c.facts().cut[kDown], &dense_cut = c.facts().cut[kDense];
        take_up(c);
        float* down = c.next_parts();
        multiply<T, R>(c.at, down_cut, c.template in_shared<T>(p.memory.up), down);
        take_attention(c, group_norm);
        float* dense = c.next_parts();
        multiply<T, R>(c.at, dense_cut, c.template in_shared<T>(p.memory.attended), dense);
        meet();
        const int shift = c.facts().lanes_shift[kDown], lanes = 1 << shift, total = (groups * R * kGroup) << shift;
        for (int v0 = threadIdx.x / 32 * 32; v0 < total; v0 += kThreads) {
            const int t = v0 + threadIdx.x % 32, v = t >> shift, part = t & (lanes - 1);
            const int output = v % kGroup, row = v / kGroup % R, group = v / (kGroup * R);
            float sum = 0.0f;
            if (t < total)
                sum = some_pieces<R>(down_cut, down, group, row, output, part, lanes) +
                      some_pieces<R>(dense_cut, dense, group, row, output, part, lanes);
            sum = sum_of_lanes(sum, lanes);
            if (t < total && part == 0)
                add_to_own(c, group, row, output,
                           sum + (down_bias.at(c, group, row, output) + dense_bias.at(c, group, row, output)), c.tag + 1);
        }
    }

    // y = x + attention(norm x), then y + mlp(norm' y)
    __device__ __forceinline__ void sequential(Context<T, R>& c, int layer) {
        const Params& p = c.p;
        {
            const Affine norm(c, p.places.attention_norm, p.layout.hidden, RowShare<R>().mine);
            const Bias bias(c, kAttention, p.places.attention_bias);
            request_state(p, layer);
            if (c.groups(kAttention) > 0) take_normalised(c, layer == 0 ? 0 : c.tag - 1, norm, nullptr);
            first_product(c, bias);
            const Affine group_norm(c, p.places.group_norm, p.layout.width(), threadIdx.x);
            const Bias dense_bias(c, kDense, p.places.dense_bias);
            attention(c, layer, ahead);
            if (c.groups(kDense) > 0) take_attention(c, group_norm);
            add_product(c, kDense, c.template in_shared<T>(p.memory.attended), dense_bias, c.tag);
        }
        const Affine norm(c, p.places.mlp_norm, p.layout.hidden, RowShare<R>().mine);
        const Bias bias(c, kUp, p.places.up_bias), down_bias(c, kDown, p.places.down_bias);
        if (c.groups(kUp) > 0) take_normalised(c, c.tag, norm, nullptr);
        up_product(c, bias, c.template in_shared<T>(p.memory.x1));
        if (c.groups(kDown) > 0) take_up(c);
        add_product(c, kDown, c.template in_shared<T>(p.memory.up), down_bias, c.tag + 1);
    }

private:
    __device__ __forceinline__ void request_state(const Params& p, int layer) {
        if (static_cast<int>(blockIdx.x) >= p.layout.heads * p.splits) return;
        const ItemPlace at(p, blockIdx.x);
        ahead.request(p, at, at.first, p.states[layer]);
    }
    static __device__ __forceinline__ void add_product(Context<T, R>& c, int matrix, const T* x, const Bias& bias, uint32_t tag) {
        rows_of(c, matrix, x, [&](bool there, int group, int row, int output, float sum, int) {
            if (there) add_to_own(c, group, row, output, sum + bias.at(c, group, row, output), tag);
        });
    }
};

template <typename T, int R> __device__ __forceinline__ void head(Context<T, R>& c) {
    const Params& p = c.p;
    const int64_t begin = 0;
    const Affine norm(c, begin, p.layout.hidden, RowShare<R>().mine);
    take_normalised(c, c.tag - 1, norm, nullptr);
    const int first = c.first_group(kHead) * kGroup;
    rows_of(c, kHead, c.template in_shared<T>(p.memory.x1), [&](bool there, int group, int row, int output, float sum, int) {
        const int id = first + group * kGroup + output;
        if (there && row < p.rows && id < p.layout.vocabulary) p.logits[row * p.logits_row_stride + id] = sum;
    });
}

__device__ __forceinline__ int64_t integer_at(const void* from, int index, int integers) {
    return integers == DIJIANG_INT64 ? static_cast<const int64_t*>(from)[index] : static_cast<const int32_t*>(from)[index];
}

// What is the same for all layers: the rows' tokens and positions, RoPE's angles, zeros that pad q and k.
template <typename T, int R> __device__ __forceinline__ void prepare(Context<T, R>& c) {
    const Params& p = c.p;
    BlockFacts& rows = const_cast<BlockFacts&>(c.facts());
    if (threadIdx.x < R) {
        const int row = threadIdx.x;
        const bool there = row < p.rows;
        const int64_t id = there ? integer_at(p.input_ids, row, p.integers) : 0, last = p.layout.vocabulary - 1;
        rows.id[row] = static_cast<int32_t>(id < 0 ? 0 : id > last ? last : id);
        const int64_t position = there ? integer_at(p.positions, row, p.integers) : 0;
        rows.position[row] = static_cast<int32_t>(position < 0 ? 0 : position > INT32_MAX ? INT32_MAX : position);
        rows.valid[row] = there && integer_at(p.seq_lens, row, p.integers) > 0;
    }
    if (threadIdx.x >= 32 && threadIdx.x < 32 + kMatrices) {
        const int matrix = threadIdx.x - 32, groups = p.layout.share(matrix, blockIdx.x + 1) - p.layout.share(matrix, blockIdx.x);
        rows.first[matrix] = p.layout.share(matrix, blockIdx.x);
        rows.groups[matrix] = groups;
        rows.cut[matrix] = Cut(groups < kBatch ? groups : kBatch, p.layout.chunks(matrix));
        // Dense and the MLP's second product are added up together.
        const Cut longer(rows.cut[matrix].groups, p.layout.chunks(matrix == kDense && p.layout.parallel ? kDown : matrix));
        rows.lanes_shift[matrix] = lanes_shift_of<R>(longer, matrix == kDown || matrix == kDense ? 5 : kMostLanesShift);
    }
    if (threadIdx.x == 0) rows.epoch = c.template in_sync<uint32_t>(0)[kEpoch];
    T* turned = c.template in_shared<T>(p.memory.turned);
    const int halves = 2 * Constants::proj_chunks(p.layout) * 2 * R * kChunk;
    for (int i = threadIdx.x; i < halves; i += kThreads) turned[i] = from_float<T>(0.0f);
    meet();
    const int half = p.layout.rotary_dim / 2;
    const float* inv_freq = reinterpret_cast<const float*>(p.packed + p.ends) + 2 * p.layout.hidden;
    float2* rotary = c.template in_shared<float2>(p.memory.rotary);
    for (int i = threadIdx.x; i < R * half; i += kThreads) {
        const float turn = rotary_turn(turns_per_token(inv_freq[i % half]), static_cast<float>(rows.position[i / half]));
        rotary_cos_sin(turn, rotary[i].x, rotary[i].y);
    }
    begin_own(c);
    meet();
}

// Has the next layer's constants brought to L2, each block a part of them; behind the last layer, what comes there.
template <typename T, int R> __device__ __forceinline__ void prefetch_constants(const Context<T, R>& c, int layer) {
    const Params& p = c.p;
    if (threadIdx.x != kThreads - 1) return;
    const int64_t begin = layer < p.layout.layers ? p.constants + layer * p.places.size : p.ends;
    const int64_t bytes = layer < p.layout.layers ? p.places.terms + 128 : ends_bytes(p.layout);
    const int64_t each = (bytes / gridDim.x + 127) / 128 * 128, from = blockIdx.x * each;
    if (from < bytes) bulk_prefetch(p.packed + begin + from, static_cast<uint32_t>(from + each < bytes ? each : bytes - from));
}

// Tags of one step: two a layer, and one behind the last. They never are 0, which no slot is waited for with.
DIJIANG_BOTH uint32_t tags_of_step(int layers) { return 2u * layers + 2u; }

template <typename T, int R> __device__ __forceinline__ void walk(const Params& p) {
    uint8_t* const shared = shared_memory();
    const Ring ring(p, shared);
    if (threadIdx.x == 0) ring.init();
    __syncthreads();
    if (threadIdx.x >= kCopier) {
        if (threadIdx.x == kCopier) copy_stream(p, ring);
        return;
    }
    Context<T, R> c(p, shared);
    prepare(c);
    const uint32_t each = tags_of_step(p.layout.layers), first = c.facts().epoch * each + 1;
    c.constants = p.packed + p.constants;
    c.tag = first + 1;
    Layer<T, R> one;
    for (int layer = 0; layer < p.layout.layers; ++layer) {
        prefetch_constants(c, layer + 1);
        if (p.layout.parallel) one.parallel(c, layer);
        else one.sequential(c, layer);
        c.constants += p.places.size;
        c.tag += 2;
    }
    head(c);
    // The last block to end counts the step; the next launch begins with new tags.
    meet();
    if (threadIdx.x == 0) {
        uint32_t* words = c.template in_sync<uint32_t>(0);
        if (atomicInc(words + kArrived, gridDim.x - 1) == gridDim.x - 1) {
            const uint32_t next = c.facts().epoch + 1;
            words[kEpoch] = next < (~0u - 1) / each ? next : 0;
        }
    }
}

template <typename T, int R> __global__ void __launch_bounds__(kThreads + 32, 1) step_kernel(const __grid_constant__ Params p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    walk<T, R>(p);
#endif
}

}  // namespace step
}  // namespace dijiang
