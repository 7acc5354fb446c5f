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
// are computed. Nothing waits for the whole cluster: blocks count what they send each other (device/cluster.cuh).
#pragma once

#include "attention/decode/slice_steps.cuh"
#include "device/overlap.cuh"

namespace dijiang {
namespace decode {

template <typename T, typename S, int Blocks>
__global__ void __launch_bounds__(S::kThreads, Blocks)
    slice_decode(const __grid_constant__ AttentionParams p, const __grid_constant__ SliceCut cut) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    constexpr int D = S::D, W = S::W;
    __shared__ alignas(16) float2 logits[2][D];
    __shared__ alignas(16) float2 features[D];
    __shared__ alignas(16) float2 logit_parts[S::kWarps][W];
    __shared__ alignas(16) float output_parts[S::kWarps][W];
    __shared__ alignas(16) float raw[2][S::kMostClusterChannels];
    __shared__ alignas(16) float values[2][W];
    __shared__ alignas(16) float2 affine[2][W];
    __shared__ alignas(8) uint64_t logits_there[2], raw_there[2];
    extern __shared__ float4 slots[];  // the next item's state: each thread's own, touched by nobody else
    const SliceMemory<S> memory = {logits, features, logit_parts,  output_parts, raw,
                                   values, affine,   logits_there, raw_there};

    const SliceThread<S> at(cut);
    let_next_kernel_start();
    memory.open();
    if (at.blocks > 1) appear_without_arrivals();

    const ItemWalk walk(p, cut);
    int number = cluster_index();
    Item item = ItemWalk::first(p, cut, at, number);
    const uint32_t first_entry = at.first_entry();
    const int half = p.rotary_dim / 2;
    wait_for_previous_kernel();

    const TurnedRow turned = {at.turned_row(), half};
    SliceInputs<T, S> inputs;
    SliceState<S> state(slots + threadIdx.x, number, item);
    if (number < cut.items) inputs.request(p, cut, at, turned, item);
    const Turns turns = turned.turns(p);
    float4 columns[S::kSteps];
    request_proj(p, at, first_entry, columns);
    state.fill(p, cut, at, walk, first_entry);
    Quad<T> proj[S::kSteps];
    round_proj(columns, proj);

    const SliceGroups groups = SliceGroups::of(cut, at);
    bool met = at.blocks == 1;  // whether the whole cluster is known to run
    uint32_t used = 0;       // items that sent anything: selects buffers and phases
    for (Item next; number < cut.items; number += walk.stride, item = next) {
        next = item;
        walk.step_on(p, next);
        const int start = item.head * D + at.split * W;  // the block's channels: W from here
        T* const output = static_cast<T*>(p.output) + item.row * p.output_batch_stride + start;
        float* const present = p.present_state + item.row * p.present_batch_stride +
                               static_cast<int64_t>(item.head) * (D * D) + first_entry;
        // This item's places are requested anew, and its inputs are used.
        const auto request_next = [&] {
            state.requested(p, walk);
            if (number + walk.stride < cut.items) inputs.request(p, cut, at, turned, next);
        };
        state.aim(p, first_entry);
        if (inputs.valid <= 0) {
            state.pass(p, cut, at, present);
            if (threadIdx.x < W) output[threadIdx.x] = from_float<T>(0.0f);
            request_next();
            continue;
        }

        const Terms terms = token_terms(p, item.head, inputs.position);
        const uint32_t buffer = used & 1, parity = (used >> 1) & 1;
        ++used;
        memory.expect(cut, at.blocks, buffer);

        float u[S::kTurned];
        inputs.turn(turns, u);
        project(memory, at, proj, u);
        inputs.keep(memory, buffer);
        if (!met) {
            wait_for_cluster();
            met = true;
        }
        __syncthreads();
        meet_logits(memory, at, buffer, parity);
        const FeatureSums sums = softmax(at, logits[buffer], features);

        // phi(q) is divided by its sum at the end, phi(k) with v.
        const float fade = expf(terms.log_decay), write = __fdividef(terms.gain, sums.key);
        const float read = __fdividef(terms.read_scale, sums.query);
        float4 v = *reinterpret_cast<const float4*>(&values[buffer][4 * at.quad]);
        v = {write * v.x, write * v.y, write * v.z, write * v.w};
        float o[4] = {};
        state.update(cut, at, features, fade, v, present, o);
        request_next();
        keep_output(memory, at, o);
        __syncthreads();

        if (cut.norm == Norm::memory) {
            finish_in_memory<T>(p, cut, memory, item, start, read);
            continue;
        }
        if (cut.norm == Norm::cluster) meet_outputs(memory, at, read, buffer, parity);
        normalise_groups<S>(
            p, cut, at, groups,
            [&](int c) {
                return cut.norm == Norm::cluster ? raw[buffer][c] : whole_output(memory, c - groups.begin, read);
            },
            [&](int c, float y) {
                const int x = c - groups.begin;
                if (x < 0 || x >= W) return;
                const float2 line = affine[buffer][x];
                output[x] = from_float<T>(fmaf(y, line.x, line.y));
            });
    }
    if (!met) wait_for_cluster();
#endif
}

// The instances of one element type, as measured best on an H200: for few heads, cut into narrow slices so
// that every multiprocessor has one, and for many, where a slice is wide so that less is done twice.
template <typename T, int D, int W, int Warps, int Blocks> SliceKernel slice_instance() {
    using S = Slice<D, W, Warps>;
    constexpr int32_t kSlots = S::kSteps * S::kThreads * static_cast<int32_t>(sizeof(float4));
    return {reinterpret_cast<const void*>(slice_decode<T, S, Blocks>), W, S::kThreads, Blocks, kSlots,
            kSlots + S::kStaticBytes};
}

template <typename T> SliceKernel slice_instance(int32_t head_dim, bool many) {
    constexpr bool kHalf = sizeof(T) == 2;  // float32 takes twice the registers for P: narrower slices
    switch (head_dim) {
        case 64: return many ? slice_instance<T, 64, 64, 4, 4>() : slice_instance<T, 64, 64, 8, 2>();
        case 80: return many ? slice_instance<T, 80, 80, 8, 2>() : slice_instance<T, 80, 40, 5, 3>();
        case 128:
            return many ? slice_instance<T, 128, kHalf ? 128 : 64, kHalf ? 4 : 8, 2>()
                        : slice_instance<T, 128, 32, 8, 2>();
        case 256:
            return many ? slice_instance<T, 256, kHalf ? 128 : 64, kHalf ? 8 : 16, 1>()
                        : slice_instance<T, 256, 32, 8, 2>();
        default: return {};
    }
}

}  // namespace decode
}  // namespace dijiang
