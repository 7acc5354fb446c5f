// Prefill for compute capability 9.0 and small heads: spans of four chunks, whose groups of four warps do the same at
// about the same time.
//
// With the tasks of hopper/kernel.cuh a block's warps walk four long loops at once and hand every tile on. Here features
// of queries, scores and outputs stay in the registers of who needs them, and the state is met once per span.
// Sequences are cut in segments of whole spans; each adds up its own keys and values first, if others follow.
#pragma once

#include "attention/prefill/hopper/kernel.cuh"
#include "attention/prefill/hopper/spans/walk.cuh"

namespace dijiang::prefill::hopper::spans {

template <typename T, int D>
__global__ void __launch_bounds__(kThreads, 1)
spans_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Cut cut) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    using S = Span<D>;
    char* const memory = block_memory();
    const uint32_t memory_at = shared_address(memory);
    Place& at = *reinterpret_cast<Place*>(memory + S::kPlace);
    let_next_kernel_start();
    if (threadIdx.x == 0) {
        make_barrier(memory_at + S::kShown, kThreads / 32);
        make_barrier(memory_at + S::kFinished, kThreads / 32);
    }
    wait_for_previous_kernel();
    if (threadIdx.x < 32) find_place<D>(p, cut, at);
    prepare_rotation(p, reinterpret_cast<float4*>(memory + S::kTurns),
                     reinterpret_cast<uint32_t*>(memory + S::kLanes));
    load_proj<T, D, kThreads>(p, memory + S::kProj);
    show_to_products();
    __syncthreads();
    const bool walks = __shfl_sync(~0u, at.segment < at.segments && at.length > 0, 0);
    if (walks) walk_spans<T, D>(p, cut, at, memory, memory_at);
    if (at.length == 0) carry_over<D, kThreads>(p, at);
    const int padding = max(at.first_token, at.length);
    if (padding < at.last_token) clear_padding<T, D, kThreads>(p, at, padding);
    if (!walks && cut.segments > 1 && threadIdx.x < 32) leave(p, kGroups);
#endif
}

#ifdef __CUDACC__
template <typename T, int D>
cudaError_t launch_spans(const AttentionParams& p, const Schedule& schedule, cudaStream_t stream) {
    return launch_over<spans_kernel<T, D>>(kThreads, Span<D>::kShared, p, schedule, stream);
}
#endif

}  // namespace dijiang::prefill::hopper::spans
