// A decoding step in one launch: every block walks all layers with its share of the rows of every matrix.
//
//   residual stream -> norms -> q, k, v, gate and the MLP's first product -> attention -> the MLP's second product and
//   dense -> residual stream, and in the end the head; without parallel residual one after the other.
//
// Slots are written again a layer later, when nobody reads the last value any more: whoever gets there had values of this
// layer from every block that read those of the last one, sent after it had met behind the reading. A block reads only
// what it has rows for, and has met once more before it sends anything that follows from it.
#pragma once

#include <type_traits>

#include "step/attention.cuh"
#include "step/outputs.cuh"

namespace dijiang {
namespace step {

// Waits for all of the MLP's inner values, some fours at a time, and brings them to where the product reads them.
template <int kAtOnce, typename T, int R> __device__ __forceinline__ void take_inner(const Context<T, R>& c) {
    const Params& p = c.p;
    const uint32_t fours = p.layout.inner >> 2, total = R * fours;
    const uint2* const slots = c.template in_sync<uint2>(p.exchange.up);
    T* const x = c.template in_shared<T>(p.memory.up);
#pragma unroll 1
    for (uint32_t start = kept(threadIdx.x); start < total; start += kAtOnce * kThreads) {
        const auto there = [&](int i) { return start + i * kThreads < total; };
        const Looks<kAtOnce, uint2> looks(slots + 2 * start, c.tag, [](int i) { return i * 2 * kThreads; }, there);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const uint32_t at = start + i * kThreads, row = R == 1 ? 0 : divide(at, p.by_fours);
            if (there(i))
                *reinterpret_cast<uint2*>(x + x_index<R>(row, 4 * (at - row * fours))) =
                    make_uint2(looks.of[i].x, looks.of[i].z);
        }
    }
}
template <typename T, int R> __device__ __forceinline__ void take_inner(const Context<T, R>& c) {
    constexpr int kFew = 4, kMany = R > 1 ? kManyLooks : kManyLooks == 16 ? 10 : kFew;
    if (R <= 2 && R * c.p.layout.inner <= kFew * 4 * kThreads) take_inner<kFew>(c);
    else take_inner<kMany>(c);
    meet();
}

// What is known when the kernel is compiled; where one program serves all matrices, an int and a bool stand in its place.
template <typename Value, Value kValue> struct Constant {
    __device__ __forceinline__ constexpr operator Value() const { return kValue; }
};

// Quantised weights: the part that one of this block's groups of attention is of.
__device__ __forceinline__ int part_of(const BlockFacts& facts, int group) {
    return (group >= facts.part_ends[0]) + (group >= facts.part_ends[1]) + (group >= facts.part_ends[2]);
}

// What becomes of an output's sum. Whole warps call this, with neighbouring outputs in neighbouring lanes.
template <bool kDealt, typename Matrix, typename Parallel, typename T, int R>
__device__ __forceinline__ void finish(Context<T, R>& c, Matrix matrix, Parallel parallel, bool there, int group, int row,
                                       float y) {
    const Params& p = c.p;
    const int output = threadIdx.x % kGroup;
    if (kDealt && matrix == kAttention) group += c.facts().part_shift[part_of(c.facts(), group - c.first_group(kAttention))];
    const int at = group * kGroup + output;
    if (matrix == kAttention) {  // to the blocks of the head
        if (there)
            put(c.template in_sync<uint2>(p.exchange.qkvg) + row * (p.layout.qkv() + p.layout.width()) + at, __float_as_uint(y),
                c.tag);
    } else if (matrix == kUp) {  // the MLP's inner values, in pairs
        const bool gated = p.layout.gated != 0;
        const int values = gated ? kGroup / 2 : kGroup;
        const float one = activate(p.activation, y, gated ? __shfl_down_sync(~0u, y, kGroup / 2) : 0.0f);
        const float next = __shfl_down_sync(~0u, one, 1);
        if (there && output % 2 == 0 && output < values)
            put(c.template in_sync<uint2>(p.exchange.up) + (row * p.layout.inner + group * values + output) / 2,
                pack<T>(one, next), c.tag);
    } else if (matrix == kHead) {
        if (there && row < p.rows && at < p.layout.vocabulary) p.logits[row * p.logits_row_stride + at] = y;
    } else if (there) {  // with parallel residual dense completes what the MLP's second product began
        const bool last = (matrix == kDown) != parallel;
        add_to_own(c, row, at, y, last || matrix == kDense, last ? c.tag + 1 : c.tag);
    }
}

// Adds up a batch's sums of warps, and has each output go where it belongs. `bias` is of this thread's first output.
template <bool kDealt, typename Matrix, typename Parallel, typename T, int R>
__device__ __forceinline__ void finish_batch(Context<T, R>& c, Matrix matrix, Parallel parallel, int first, int groups,
                                             const float* biases, float bias) {
    const float* const sums = c.template in_shared<float>(c.p.memory.sums);
    const int total = groups * R * kGroup;
    int v = kept(threadIdx.x);
#pragma unroll 1
    for (int start = v & ~31; start < total;) {
        const int row = v / kGroup % R, group = v / (kGroup * R);
        float y = bias, other = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; w += 2) {
            y += sums[v + w * kSumsOfWarp<R>];
            other += sums[v + (w + 1) * kSumsOfWarp<R>];
        }
        finish<kDealt>(c, matrix, parallel, v < total, first + group, row, y + other);
        v += kThreads;
        start += kThreads;
        if (start >= total) break;
        if (matrix != kHead && v < total) bias = __ldg(biases + v / (kGroup * R) * kGroup);
    }
}

// This block's rows of a matrix times what take() waits for, kBatch groups at a time. meanwhile() asks for what comes
// next, behind every batch: it is not worth a condition.
template <int kMatrix, bool kParallel, typename T, int R, typename Take, typename Meanwhile>
__device__ __forceinline__ void product(Context<T, R>& c, Take take, Meanwhile meanwhile) {
    const Part part = c.facts().of[kMatrix];
    const auto wait = [&] {
        c.set_waiting(true);
        take();
        c.set_waiting(false);
    };
    if (part.groups <= 0) {
        // With parallel residual both products of the normalised rows are served at once.
        if (kMatrix == kAttention && kParallel && c.groups(kUp) > 0) wait();
        return meanwhile();
    }
    Multiplier<T, R> multiplier(c.at);
    Units first;
    multiplier.fetch(first);
    const int mine = threadIdx.x / (kGroup * R);  // this thread's first group of a batch
    const float* const biases = c.constant(c.p.biases[kMatrix]) + part.first * kGroup + threadIdx.x % kGroup;
    const auto bias_of = [&](int group) { return kMatrix != kHead && group < part.groups ? __ldg(biases + group * kGroup) : 0.0f; };
    float bias = bias_of(mine);
    wait();
    const T* const x = c.template in_shared<T>(c.p.inputs[kMatrix]);
    float* const sums = c.template in_shared<float>(c.p.memory.sums) + threadIdx.x / 32 * kSumsOfWarp<R>;
#pragma unroll 1
    for (int batch = 0;;) {
        const int groups = min(kBatch, part.groups - batch);
        if (part.chunks < kWarps) {  // then some warps have nothing of some groups
#pragma unroll 1
            for (int i = threadIdx.x % 32; i < groups * R * kGroup; i += 32) sums[i] = 0.0f;
            __syncwarp();
        }
        multiplier.run(first, x, part.chunks, groups * part.chunks, sums);
        meanwhile();
        meet();
        finish_batch<false>(c, Constant<int, kMatrix>(), Constant<bool, kParallel>(), part.first + batch, groups,
                            biases + batch * kGroup, bias);
        batch += kBatch;
        if (batch >= part.groups) break;
        bias = bias_of(batch + mine);
        multiplier.fetch(first);
        meet();
    }
}

__device__ __forceinline__ int64_t integer_at(const void* from, int index, int integers) {
    return integers == DIJIANG_INT64 ? static_cast<const int64_t*>(from)[index] : static_cast<const int32_t*>(from)[index];
}

// A thread for each matrix finds out which rows of it this block has.
template <bool kQuantised, typename T, int R> __device__ __forceinline__ void set_parts(Context<T, R>& c) {
    const int matrix = static_cast<int>(threadIdx.x) - 32;
    if (matrix < 0 || matrix >= kMatrices) return;
    const Layout& layout = c.p.layout;
    const int first = layout.share(matrix, blockIdx.x), groups = layout.share(matrix, blockIdx.x + 1) - first;
    const int chunks = layout.chunks(matrix);
    BlockFacts& facts = const_cast<BlockFacts&>(c.facts());
    facts.of[matrix] = {first, groups, chunks, groups * chunks};
    if constexpr (kQuantised) {
        if (matrix != kAttention) return;
        int end = 0;
#pragma unroll 1
        for (int part = 0; part < kParts; ++part) {
            const int before = layout.dealt(part, first);
            facts.part_before[part] = before;
            facts.part_shift[part] = layout.part_begin(part) + before - (first + end);
            facts.part_ends[part] = end += layout.dealt(part, first + groups) - before;
        }
    }
}

// A thread for each matrix and format, and one for each warp besides.
template <typename T, int R> __device__ __forceinline__ void set_turns(Context<T, R>& c) {
    const int which = threadIdx.x / kWarps, warp = threadIdx.x % kWarps, matrix = which / 2, eight = which % 2;
    if (matrix >= kMatrices) return;
    const int units = units_of_group(c.p.layout.chunks(matrix), eight != 0);
    BlockFacts& facts = const_cast<BlockFacts&>(c.facts());
    if (warp == 0)
        facts.turns[matrix][eight] = {static_cast<uint16_t>(units), static_cast<uint16_t>(kWarps / units), static_cast<uint16_t>(kWarps % units), 0};
    facts.starts[matrix][eight][warp] = static_cast<uint16_t>(warp / units * 256 + warp % units);
}

// The walk of who copies.
template <typename T, int R> __device__ __forceinline__ void copy_stream(const Context<T, R>& c, const Ring<FloatCut>& ring) {
    Copier copier(c.p, ring, &const_cast<BlockFacts&>(c.facts()).waiting);
    const int all = c.p.layout.layers * kOfLayer;
#pragma unroll 1
    for (int i = 0; i <= all; ++i) copier.copy(c.facts().of[i == all ? kHead : c.p.layout.at(i % kOfLayer)]);
}

// What is the same for all layers: the rows' tokens and positions, RoPE's angles, zeros that pad q and k.
template <bool kQuantised, typename T, int R> __device__ __forceinline__ void prepare(Context<T, R>& c) {
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
    if (kQuantised && p.memory.padded)
        for (int i = p.memory.x1 + 4 * threadIdx.x; i < p.memory.sums; i += 4 * kThreads) *c.template in_shared<uint32_t>(i) = 0;
    meet();
    const int half = p.layout.rotary_dim / 2;
    const float* inv_freq = reinterpret_cast<const float*>(p.packed + p.ends) + 2 * p.layout.hidden;
    float2* rotary = c.template in_shared<float2>(p.memory.rotary);
    for (int i = threadIdx.x; i < R * half; i += kThreads) {
        const float turn = rotary_turn(turns_per_token(inv_freq[i % half]), static_cast<float>(rows.position[i / half]));
        rotary_cos_sin(turn, rotary[i].x, rotary[i].y);
    }
    begin_own<kQuantised>(c);
    take_embedding<kQuantised>(c);
    meet();
}

// Has the next layer's constants brought to L2, each block a part of them; behind the last layer, what comes there.
template <typename T, int R> __device__ __forceinline__ void prefetch_constants(const Context<T, R>& c, int layer) {
    const Params& p = c.p;
    if (threadIdx.x < kThreads - 32) return;
    const int64_t begin = layer < p.layout.layers ? p.constants + layer * p.places.size : p.ends;
    const int64_t bytes = layer < p.layout.layers ? p.places.terms + 128 : ends_bytes(p.layout);
    const int64_t each = (bytes / gridDim.x + 127) / 128 * 128, from = blockIdx.x * each;
    if (from < bytes) prefetch(p.packed + begin + from, static_cast<uint32_t>(from + each < bytes ? each : bytes - from));
}

// Walks all layers and the head.
template <bool kParallel, typename T, int R> __device__ __forceinline__ void walk_layers(Context<T, R>& c) {
    const Params& p = c.p;
    Attention<T, R> attention(c);
    Requests<R> asked{};
    const auto nothing = [] {};
    const auto hidden = [&](uint32_t tag, int64_t norm, bool both) { take_normalised(c, tag, norm, both); };
#pragma unroll 1
    for (int layer = 0; layer < p.layout.layers; ++layer) {
        const uint32_t before = layer == 0 ? 0 : c.tag - 1;
        product<kAttention, kParallel>(c, [&] { hidden(before, p.places.attention_norm, kParallel); }, [&] {
            attention.request_state(c, asked, layer);
            prefetch_constants(c, layer + 1);
        });
        if (kParallel) {  // x + attention(norm x) + mlp(norm' x); meet(): q, k, v and gate have been added up
            product<kUp, kParallel>(c, [] { meet(); }, [&] { attention.request_proj(c, asked); });
            attention.template run<false>(c, asked, layer);
            product<kDown, kParallel>(c, [&] { take_inner(c); }, nothing);
            product<kDense, kParallel>(c, [&] { take_outputs(c); }, nothing);
        } else {  // y = x + attention(norm x), then y + mlp(norm' y)
            attention.request_proj(c, asked);
            attention.template run<false>(c, asked, layer);
            product<kDense, kParallel>(c, [&] { take_outputs(c); }, nothing);
            product<kUp, kParallel>(c, [&] { hidden(c.tag, p.places.mlp_norm, false); }, nothing);
            product<kDown, kParallel>(c, [&] { take_inner(c); }, nothing);
        }
        c.constants += p.places.size;
        c.tag += 2;
    }
    product<kHead, kParallel>(c, [&] { hidden(c.tag - 1, 0, false); }, nothing);
}

// Tags of one step: two a layer, and one behind the last. They never are 0, which no slot is waited for with.
DIJIANG_BOTH uint32_t tags_of_step(int layers) { return 2u * layers + 2u; }

// A block's whole step: `copy` is the walk of who copies, `layers` that of all others.
template <typename Cut, typename T, int R, typename Copy, typename Layers>
__device__ __forceinline__ void walk(const Params& p, Copy copy, Layers layers) {
    constexpr bool kQuantised = std::is_same<Cut, QuantisedCut>::value;
    uint8_t* const shared = shared_memory();
    const Ring<Cut> ring(p, shared);
    if (threadIdx.x == 0) ring.init();
    Context<T, R> c(p, shared, ring);
    c.set_waiting(false);
    set_parts<kQuantised>(c);
    if (kQuantised) set_turns(c);
    __syncthreads();
    if (threadIdx.x >= kCopier) {
        if (threadIdx.x < kCopier + kCopiers) copy(c, ring);
        return;
    }
    prepare<kQuantised>(c);
    const uint32_t each = tags_of_step(p.layout.layers), first = c.facts().epoch * each + 1;
    c.constants = p.packed + p.constants;
    c.tag = first + 1;
    layers(c);
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

// DIJIANG_STEP_ARCHITECTURE of plugins/CMakeLists.txt leaves the kernel out elsewhere.
#ifdef DIJIANG_STEP_ARCHITECTURE
#define DIJIANG_STEP_HERE (__CUDA_ARCH__ == 10 * DIJIANG_STEP_ARCHITECTURE)
#else
#define DIJIANG_STEP_HERE 1
#endif

template <typename T, int R, bool kParallel>
__global__ void __launch_bounds__(kThreads + 32, 1) step_kernel(const __grid_constant__ Params p) {
#if !defined(__CUDA_ARCH__) || DIJIANG_STEP_HERE
    walk<FloatCut, T, R>(
        p, [](const Context<T, R>& c, const Ring<FloatCut>& ring) { copy_stream(c, ring); },
        [](Context<T, R>& c) { walk_layers<kParallel>(c); });
#else
    __trap();
#endif
}

}  // namespace step
}  // namespace dijiang
