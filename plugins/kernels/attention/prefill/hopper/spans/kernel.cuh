// Prefill for compute capability 9.0 and small heads: spans of four chunks, whose groups of four warps do the same at
// about the same time.
//
// With the roles of kernel.cuh above a block's warps walk four long loops at once and hand every tile on. Here features
// of queries, scores and outputs stay in the registers of who needs them, and the state is met once per span.
// Sequences are cut in segments of whole spans; each adds up its own keys and values first, if others follow.
#pragma once

#include "attention/prefill/hopper/kernel.cuh"
#include "attention/prefill/hopper/spans/walk.cuh"

namespace dijiang::prefill::hopper::spans {

// A warp of each block, when the block has read what it waited for: the last one leaves the sync memory as it was
// found.
__device__ __forceinline__ void leave(const AttentionParams& p) {
    unsigned before = 0;
    __syncwarp();
    if (lane_of() == 0) {
        __threadfence();
        before = atomicAdd(p.sync + 1, 1u);
        __threadfence();
    }
    if (__shfl_sync(~0u, before, 0) == gridDim.x - 1)
        for (int i = lane_of(); i < 2 + kGroups * static_cast<int>(gridDim.x); i += 32) p.sync[i] = 0;
}

template <typename T, int D>
__device__ __forceinline__ void walk_spans(const AttentionParams& p, const Cut& cut, const Place& at, char* memory,
                                           uint32_t memory_at) {
    using S = Span<D>;
    // The same in all lanes, and known to be: what follows is for the uniform units.
    const int group = __shfl_sync(~0u, threadIdx.x / kGroup, 0);
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    const int chunks = __shfl_sync(~0u, at.last_chunk - at.first_chunk, 0);
    const int segment = __shfl_sync(~0u, at.segment, 0);
    const bool followed = __shfl_sync(~0u, at.segment + 1 < at.segments, 0), single = chunks <= kGroups;
    const int spans = (chunks + kGroups - 1) / kGroups;
    const Walker<T, D> walker{p, at, memory, memory_at, group, chunks, at.decay[0], RotaryLane(p.rotary_dim / 2)};
    const uint32_t finished = memory_at + S::kBarrier;  // a span's products, by all warps
    const int64_t states = static_cast<int64_t>(at.first_head) * D * D;
    int turn = 0;  // spans so far, of both walks

    // Batches of copies in this order: keys, values, queries, gates.
    walker.load_keys(0);
    walker.load_values(0);
    if (single || !followed) walker.load_queries(0), walker.load_gates(0);
    Part<D> part;  // times kStateUnit
#pragma unroll
    for (int n = 0; n < S::kPieces; ++n) part[n][0] = part[n][1] = part[n][2] = part[n][3] = 0.0f;
    if (segment == 0) {
        const float* past = p.past_state + at.row * p.past_batch_stride + states;
        each_pair<D>(part, group, [&](int i, float& x, float& y) {
            const float2 both = *reinterpret_cast<const float2*>(past + i);
            x = both.x * kStateUnit<T>, y = both.y * kStateUnit<T>;
        });
    }
    if (followed) {
        Part<D> sum;
#pragma unroll
        for (int n = 0; n < S::kPieces; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[n][i] = part[n][i];
#pragma unroll 1
        for (int span = 0; span < spans; ++span, ++turn) {
            if (single)
                wait_copies<3>();
            else
                wait_copies<1>();
            if (walker.has(span)) {
                typename Walker<T, D>::Features packed;
                walker.find_features(walker.keys(), span, packed, [&] {
                    if (!single) walker.load_keys(span + 1);
                });
                if (single) walker.store_keys(packed);
                walker.weigh(span, true, packed);
                await_phase(finished, turn & 1 ^ 1);
                walker.store_weighted(packed);
            } else {
                if (!single) commit_copies();
                await_phase(finished, turn & 1 ^ 1);
            }
            if (!single) walker.load_values(span + 1);
            wait_copies<2>();  // this span's values are there
            show_to_products();
            barrier_sync(kAll, kThreads);
            walker.add_chunks(span, 0, sum);
            warp_arrives(finished);
        }
        Exchange<D>(p, cut, at, group).publish(segment, sum);
        if (!single) {
            await_phase(finished, turn & 1 ^ 1);
            walker.load_keys(0);
            walker.load_values(0);
            walker.load_queries(0);
            walker.load_gates(0);
        }
    }
    float scale = 1.0f;  // of the state's copy
    // Before anybody reads a span: the state's copy is there, and what all have made.
    const auto meet = [&](int span) {
        if (span == 0 && segment > 0)
            Exchange<D>(p, cut, at, group).collect(segment, fast_exp2(walker.decay * (cut.segment_chunks * kChunk)),
                                                   part);
        show_part<T, D>(part, scale, memory, memory_at, group);
        show_to_products();
        barrier_sync(kAll, kThreads);
        if (span == 0 && cut.segments > 1 && warp == 0) leave(p);
    };
#pragma unroll 1
    for (int span = 0; span < spans; ++span, ++turn) {
        // What a branch makes ends with it, or the compiler would keep room for it in the other one.
        if (walker.has(span)) {
            typename Walker<T, D>::Features packed;
            if (span == 0)
                wait_copies<3>();
            else
                wait_copies<1>();
            const bool known = single && followed;  // the keys: from the first walk
            if (known) walker.load_values(span + 1), wait_copies<2>();
#pragma unroll 1
            for (int queries = known; queries < 2; ++queries) {  // keys, then queries: the same code
                const int tile = queries ? walker.queries() : walker.keys();
                walker.find_features(tile, span, packed, [&] {
                    if (queries) walker.load_queries(span + 1);
                });
                if (!queries) {
                    walker.store_keys(packed);
                    walker.weigh(span, true, packed);
                    await_phase(finished, turn & 1 ^ 1);
                    walker.store_weighted(packed);
                    walker.load_values(span + 1);
                    wait_copies<2>();
                }
            }
            uint32_t scores[kChunk / 8][2];
            find_scores<T, D>(packed, memory_at + walker.keys(), walker.decay, scores);
            barrier_sync(meeting_of(group), kGroup);
            walker.load_keys(span + 1);
            walker.weigh(span, false, packed);
            meet(span);
            float out[S::kTiles][4];
            walker.read_span(span, packed, scores, part, out);
            walker.add_chunks(span, group, part);
            warp_arrives(finished);
            wait_copies<3>();  // gates
            __syncwarp();
            walker.write(span, out);
            walker.load_gates(span + 1);
        } else {  // the last span
            wait_copies<0>();
            await_phase(finished, turn & 1 ^ 1);
            meet(span);
            walker.add_chunks(span, 0, part);
            warp_arrives(finished);
        }
    }
    if (!followed) {
        float* present = p.present_state + at.row * p.present_batch_stride + states;
        each_pair<D>(part, group, [&](int i, float& x, float& y) {
            *reinterpret_cast<float2*>(present + i) = make_float2(x * (1.0f / kStateUnit<T>),
                                                                  y * (1.0f / kStateUnit<T>));
        });
    }
}

template <typename T, int D>
__global__ void __launch_bounds__(kThreads, 1)
spans_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Cut cut) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    using S = Span<D>;
    char* const memory = block_memory();
    const uint32_t memory_at = shared_address(memory);
    Place& at = *reinterpret_cast<Place*>(memory + S::kPlace);
    let_next_kernel_start();
    if (threadIdx.x == 0) make_barrier(memory_at + S::kBarrier, kThreads / 32);
    wait_for_previous_kernel();
    if (threadIdx.x < 32) find_place<D>(p, cut, at);
    prepare_rotation(p, reinterpret_cast<float4*>(memory + S::kTurns));
    load_proj<T, D, kThreads>(p, memory + S::kProj);
    show_to_products();
    __syncthreads();
    const bool walks = __shfl_sync(~0u, at.segment < at.segments && at.length > 0, 0);
    if (walks) walk_spans<T, D>(p, cut, at, memory, memory_at);
    if (at.length == 0) carry_over<D, kThreads>(p, at);
    const int padding = max(at.first_token, at.length);
    if (padding < at.last_token) clear_padding<T, D, kThreads>(p, at, padding);
    if (!walks && cut.segments > 1 && threadIdx.x < 32) leave(p);
#endif
}

#ifdef __CUDACC__
template <typename T, int D>
cudaError_t launch_spans(const AttentionParams& p, const Schedule& schedule, cudaStream_t stream) {
    const auto kernel = spans_kernel<T, D>;
    static SharedMemoryGrant grant;
    const cudaError_t status = grant(reinterpret_cast<const void*>(kernel), Span<D>::kShared);
    if (status != cudaSuccess) return status;
    return launch_over(kernel, kThreads, Span<D>::kShared, p, schedule, stream);
}
#endif

}  // namespace dijiang::prefill::hopper::spans
