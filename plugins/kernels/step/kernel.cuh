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
#include "step/outputs.cuh"

namespace dijiang {
namespace step {

// All of the MLP's inner values, four at a time, to where the product reads them.
template <typename T, int R> __device__ __forceinline__ void take_up(Context<T, R>& c) {
    constexpr int kAtOnce = 4;
    const Params& p = c.p;
    const uint32_t fours = p.layout.inner >> 2, total = R * fours;
    const uint2* const slots = c.template in_sync<uint2>(p.exchange.up);
    T* const x = c.template in_shared<T>(p.memory.up);
#pragma unroll 1
    for (uint32_t start = threadIdx.x; start < total; start += kAtOnce * kThreads) {
        const uint2* from[kAtOnce];
        uint4 v[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) from[i] = slots + 2 * min(start + i * kThreads, total - 1);
        await([&] {
            bool there = true;
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                v[i] = look_at_two(from[i]);
                there &= v[i].y == c.tag && v[i].w == c.tag;
            }
            return there;
        });
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const uint32_t at = start + i * kThreads, row = R == 1 ? 0 : divide(at, p.by_fours);
            if (at < total)
                *reinterpret_cast<uint2*>(x + x_index<R>(row, 4 * (at - row * fours))) = make_uint2(v[i].x, v[i].z);
        }
    }
    meet();
}

// What becomes of an output's sum. Whole warps call this, with neighbouring outputs in neighbouring lanes.
template <typename T, int R>
__device__ __forceinline__ void finish(Context<T, R>& c, int matrix, bool there, int group, int row, float y) {
    const Params& p = c.p;
    const int output = threadIdx.x % kGroup, at = (c.first_group(matrix) + group) * kGroup + output;
    switch (matrix) {
        case kAttention:  // to the blocks of the head
            if (there)
                put(c.template in_sync<uint2>(p.exchange.qkvg) + row * (p.layout.qkv() + p.layout.width()) + at,
                    __float_as_uint(y), c.tag);
            break;
        case kUp: {  // the MLP's inner values, in pairs
            const bool gated = p.layout.gated != 0;
            const int values = gated ? kGroup / 2 : kGroup, first = (c.first_group(kUp) + group) * values;
            const float one = activate(p.activation, y, __shfl_down_sync(~0u, y, kGroup / 2));
            const float next = __shfl_down_sync(~0u, one, 1);
            if (there && output % 2 == 0 && output < values)
                put(c.template in_sync<uint2>(p.exchange.up) + (row * p.layout.inner + first + output) / 2,
                    pack<T>(one, next), c.tag);
            break;
        }
        case kHead:
            if (there && row < p.rows && at < p.layout.vocabulary) p.logits[row * p.logits_row_stride + at] = y;
            break;
        default: {  // with parallel residual dense completes what the MLP's second product began
            const bool last = (matrix == kDown) != (p.layout.parallel != 0);
            const bool tell = last || matrix == kDense;
            if (there) add_to_own(c, group, row, output, y, tell, last ? c.tag + 1 : c.tag);
        }
    }
}

// Has this block wait for what a matrix is multiplied with, and bring it to shared memory.
template <typename T, int R> __device__ __forceinline__ void take(Context<T, R>& c, int matrix, bool first_layer) {
    const Params& p = c.p;
    const bool parallel = p.layout.parallel != 0;
    switch (matrix) {
        case kDown: return take_up(c);
        case kDense: return take_attention(c);
        case kUp:
            if (parallel) meet();  // the last product's sums have been added up
            else take_normalised(c, c.tag, p.places.mlp_norm, false);
            return;
        default:
            take_normalised(c, first_layer ? 0 : c.tag - 1, matrix == kHead ? 0 : p.places.attention_norm,
                            parallel && matrix == kAttention);
    }
}

// Adds up a batch's sums of warps, and has each output go where it belongs. `bias` is of this thread's first output, with
// others kThreads / (8 R) groups on.
template <typename T, int R>
__device__ __forceinline__ void finish_batch(Context<T, R>& c, int matrix, int batch, int groups, const float* biases, float bias) {
    const float* const sums = c.template in_shared<float>(c.p.memory.sums);
    const int total = groups * R * kGroup, of_warp = c.p.sums_of_warp;
    int v = threadIdx.x;
#pragma unroll 1
    for (int start = v & ~31; start < total;) {
        const int row = (v >> 3) % R, group = batch + v / (kGroup * R);
        const float* from = sums + v;
        float y = bias;
#pragma unroll
        for (int w = 0; w < kWarps; ++w, from += of_warp) y += *from;
        finish(c, matrix, v < total, group, row, y);
        v += kThreads;
        start += kThreads;
        if (biases != nullptr && v < total) bias = __ldg(biases + (batch + v / (kGroup * R)) * kGroup);
    }
}

// This block's rows of a matrix times what it waits for, kBatch groups at a time.
template <typename T, int R> __device__ __forceinline__ void product(Context<T, R>& c, int matrix, bool first_layer) {
    const Part part = c.facts().of[matrix];
    const T* const x = c.template in_shared<T>(c.p.inputs[matrix]);
    const float* const biases =
        matrix == kHead ? nullptr : c.constant(c.p.biases[matrix]) + part.first * kGroup + threadIdx.x % kGroup;
    const int mine = threadIdx.x / (kGroup * R);  // this thread's first group of a batch
    const auto bias_of = [&](int group) { return biases != nullptr && group < part.groups ? __ldg(biases + group * kGroup) : 0.0f; };
    Multiplier<T, R> multiplier(c.at);
    float bias = bias_of(mine);
    if (part.groups > 0) multiplier.fetch();
    // With parallel residual both products of the normalised rows are served at once.
    if (part.groups > 0 || (matrix == kAttention && c.p.layout.parallel && c.groups(kUp) > 0)) {
        c.set_waiting(true);
        take(c, matrix, first_layer);
        c.set_waiting(false);
    }
    float* const sums = c.template in_shared<float>(c.p.memory.sums) + threadIdx.x / 32 * c.p.sums_of_warp;
#pragma unroll 1
    for (int batch = 0; batch < part.groups;) {
        const int groups = min(kBatch, part.groups - batch);
        if (part.chunks < kWarps) {  // then some warps have nothing of some groups
#pragma unroll 1
            for (int i = threadIdx.x % 32; i < groups * R * kGroup; i += 32) sums[i] = 0.0f;
            __syncwarp();
        }
        multiplier.run(x, part.chunks, groups * part.chunks, sums);
        meet();
        finish_batch(c, matrix, batch, groups, biases, bias);
        batch += kBatch;
        if (batch >= part.groups) break;
        bias = bias_of(batch + mine);
        multiplier.fetch();
        meet();
    }
}

__device__ __forceinline__ int64_t integer_at(const void* from, int index, int integers) {
    return integers == DIJIANG_INT64 ? static_cast<const int64_t*>(from)[index] : static_cast<const int32_t*>(from)[index];
}

// A thread for each matrix finds out which rows of it this block has.
template <typename T, int R> __device__ __forceinline__ void set_parts(Context<T, R>& c) {
    const int matrix = static_cast<int>(threadIdx.x) - 32;
    if (matrix < 0 || matrix >= kMatrices) return;
    const Layout& layout = c.p.layout;
    const int first = layout.share(matrix, blockIdx.x), groups = layout.share(matrix, blockIdx.x + 1) - first;
    const int chunks = layout.chunks(matrix);
    const_cast<BlockFacts&>(c.facts()).of[matrix] = {first, groups, chunks, groups * chunks};
}

// The copying thread's walk.
template <typename T, int R> __device__ __forceinline__ void copy_stream(const Context<T, R>& c, const Ring& ring) {
    Copier copier(c.p, ring, c.facts().waiting);
    const int all = c.p.layout.layers * kOfLayer;
#pragma unroll 1
    for (int i = 0; i <= all; ++i) copier.copy(c.facts().of[i == all ? kHead : c.p.layout.at(i % kOfLayer)]);
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
    take_embedding(c);
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

// Walks all layers and the head: attention comes behind q, k, v and gate, with parallel residual behind the MLP's first
// product too. Each kind of work is in the program once, so that the instruction caches hold it.
template <typename T, int R> __device__ __forceinline__ void walk_layers(Context<T, R>& c) {
    const Params& p = c.p;
    const int all = p.layout.layers * kOfLayer, before = p.layout.parallel ? kUp : kAttention;
    Attention<T, R> attention(c);
#pragma unroll 1
    for (int i = 0; i <= all; ++i) {
        const int layer = i / kOfLayer, turn = i % kOfLayer, matrix = i == all ? kHead : p.layout.at(turn);
        if (turn == 0) {
            prefetch_constants(c, layer + 1);
            if (i < all) attention.request(c, layer);
        }
        product(c, matrix, layer == 0);
        if (matrix == before) attention.run(c, layer);
        if (turn == kOfLayer - 1) {
            c.constants += p.places.size;
            c.tag += 2;
        }
    }
}

// Tags of one step: two a layer, and one behind the last. They never are 0, which no slot is waited for with.
DIJIANG_BOTH uint32_t tags_of_step(int layers) { return 2u * layers + 2u; }

template <typename T, int R> __device__ __forceinline__ void walk(const Params& p) {
    uint8_t* const shared = shared_memory();
    const Ring ring(p, shared);
    if (threadIdx.x == 0) ring.init();
    Context<T, R> c(p, shared);
    c.set_waiting(false);
    set_parts(c);
    __syncthreads();
    if (threadIdx.x >= kCopier) {
        if (threadIdx.x == kCopier) copy_stream(c, ring);
        return;
    }
    prepare(c);
    
    const uint32_t each = tags_of_step(p.layout.layers), first = c.facts().epoch * each + 1;
    c.constants = p.packed + p.constants;
    c.tag = first + 1;
    walk_layers(c);
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
