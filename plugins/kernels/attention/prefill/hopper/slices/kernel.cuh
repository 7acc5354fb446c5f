// Prefill for compute capability 9.0 and heads of 256: features first, then the states, in slices of 64 value columns.
//
// A head's state is 256 KiB in float32, more than a block's registers hold. So each of four blocks has 64 of its value
// columns, and what all of them need, features and scores, is made once, by the kernel before (make_features.cuh), and
// brought from the L2 cache once for a cluster. A block's groups of four warps:
//   state    S^T [64 values, 256 features] in accumulators: for each chunk o^T = v^T scores^T + S^T (fade phi(q))^T,
//            then S^T = gamma^64 S^T + v^T phi(k)
//   outputs  GroupNorm and gate
//   copies   what comes from device memory, by the bulk copy engine
// Sequences are cut in segments as in fused.cuh: keys and states walk a segment that others follow twice.
#pragma once

#include "attention/prefill/hopper/kernel.cuh"
#include "attention/prefill/hopper/slices/fetch.cuh"
#include "attention/prefill/hopper/slices/make_features.cuh"
#include "attention/prefill/hopper/slices/outputs.cuh"
#include "attention/prefill/hopper/slices/state.cuh"

namespace dijiang::prefill::hopper::slices {

// What any of a few rows and heads may need, asked for before it is known which.
struct Glance {
    int length, position;
    float log_decay;
    __device__ __forceinline__ explicit Glance(const AttentionParams& p)
        : length(p.seq_lens[min(lane_of(), p.batch - 1)]),
          position(p.positions[min(lane_of(), p.batch - 1)]),
          log_decay(p.log_decay[min(lane_of(), p.num_heads - 1)]) {}
};

// A warp.
template <int D>
__device__ __forceinline__ void find_place(const AttentionParams& p, const Cut& cut, const Glance& seen, int segment,
                                           int job, int slice, Place& at) {
    const int lane = lane_of(), tokens = cut.segment_chunks * kChunk;
    const int row = job / p.num_heads, head = job - row * p.num_heads;
    int length = seen.length, position = seen.position;
    if (row >= 32) length = p.seq_lens[row], position = p.positions[row];
    if (lane == head) at.decay[0] = fmaxf(seen.log_decay, kLeastLogDecay) * kLog2E;
    if (lane == row % 32) {
        length = min(max(length, 0), p.length);
        at.segment = segment;
        at.job = job;
        at.row = row;
        at.first_head = head;
        at.kv_head[0] = head / (p.num_heads / p.num_kv_heads);
        at.length = length;
        at.position = position;
        at.segments = max(1, (length + tokens - 1) / tokens);
        const int column = head * D + slice * Slice<D>::kColumns;
        at.qkv = static_cast<const uint16_t*>(p.qkv) + row * p.qkv_batch_stride;
        at.gate = static_cast<const uint16_t*>(p.gate) + row * p.gate_batch_stride + column;
        at.output = static_cast<uint16_t*>(p.output) + row * p.output_batch_stride + column;
        at.first_token = segment * tokens;
        at.last_token = min(at.first_token + tokens, p.length);
        at.first_chunk = at.first_token / kChunk;
        at.last_chunk = (min(at.last_token, length) + kChunk - 1) / kChunk;
    }
    __syncwarp();  // or this warp would go on in two parts
}

// A row without tokens: its state goes over as it is, a part of it by each block.
template <int D>
__device__ __forceinline__ void carry_slice_over(const AttentionParams& p, const Place& at, int slice) {
    using S = Slice<D>;
    const int64_t first = static_cast<int64_t>(at.first_head) * D * D + slice * (D * D / S::kSlices);
    const float4* past = reinterpret_cast<const float4*>(p.past_state + at.row * p.past_batch_stride + first);
    float4* present = reinterpret_cast<float4*>(p.present_state + at.row * p.present_batch_stride + first);
    if (past == present || at.segment > 0) return;
    for (int i = threadIdx.x; i < D * D / S::kSlices / 4; i += S::kThreads) present[i] = past[i];
}

template <typename T, int D>
__device__ __forceinline__ void walk_slice(const AttentionParams& p, const SliceCut& cut, const Place& at,
                                           char* memory, uint32_t memory_at, int rank, int slice) {
    using S = Slice<D>;
    // The same in all lanes, and known to be: what follows is for the uniform units.
    const int group = __shfl_sync(~0u, threadIdx.x / kGroup, 0);
    const int chunks = __shfl_sync(~0u, at.last_chunk - at.first_chunk, 0);
    const bool followed = __shfl_sync(~0u, at.segment + 1 < at.segments, 0);
    const Walk<D> walk{p, cut.cut, at, memory, memory_at, rank, slice, chunks, followed, at.decay[0],
                       SliceBarriers<D>{memory_at + S::kBarriers}};
    if (group == 0) {
        take_registers<S::kStateRegisters>();
        keep_state<T, D>(walk);
    } else if (group == 1) {
        give_registers<S::kOutputRegisters>();
        make_outputs<T, D>(walk);
    } else {
        give_registers<S::kCopyRegisters>();
        fetch<D>(walk, cut.items);
    }
}

template <typename T, int D>
__global__ void __launch_bounds__(Slice<D>::kThreads, 1)
slices_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ SliceCut cut) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    using S = Slice<D>;
    char* const memory = block_memory();
    const uint32_t memory_at = shared_address(memory);
    Place& at = *reinterpret_cast<Place*>(memory + S::kPlace);
    const int rank = cluster_block();
    let_next_kernel_start();
    // The cluster's ticket, drawn by one block for all.
    uint64_t& ticket = *reinterpret_cast<uint64_t*>(memory + S::kTicket);
    uint64_t* const told = &ticket + 1;
    if (threadIdx.x == 0) {
        SliceBarriers<D>{memory_at + S::kBarriers}.make();
        if (cut.cut.segments > 1) {
            make_arrival(told);
            expect_arrival(told, sizeof ticket);
        }
    }
    appear_in_cluster();
    uint32_t drawn = 0;
    if (cut.cut.segments > 1 && rank == 0 && threadIdx.x == 0) drawn = atomicAdd(p.sync, 1u);
    // Features alone are waited for, by who fetches them: the kernels before those had ended when this one began.
    const Glance seen(p);
    wait_for_cluster();
    int work = blockIdx.x / S::kBlocks;
    if (cut.cut.segments > 1) {
        if (rank == 0 && threadIdx.x < 32) {
            drawn = __shfl_sync(~0u, drawn, 0);
            if (lane_of() < S::kBlocks) send(&ticket, uint64_t{drawn}, lane_of(), told);
        }
        await_arrival(told);
        __syncwarp();
        work = static_cast<int>(ticket);
    }
    constexpr int kParts = S::kSlices / S::kBlocks;  // clusters of a head
    const int jobs = p.batch * p.num_heads, of_all = work / kParts, segment = of_all / jobs;
    const int slice = (work - of_all * kParts) * S::kBlocks + rank;
    if (threadIdx.x < 32) find_place<D>(p, cut.cut, seen, segment, of_all - segment * jobs, slice, at);
    __syncthreads();
    const bool walks = __shfl_sync(~0u, at.segment < at.segments && at.length > 0, 0);
    if (at.length == 0) carry_slice_over<D>(p, at, slice);
    const int padding = max(at.first_token, at.length);
    if (padding < at.last_token) clear_padding<T, S::kColumns, S::kThreads>(p, at, padding);
    if (!walks && cut.cut.segments > 1 && threadIdx.x < 32) leave(p, 1);
    __syncwarp();
    if (walks) walk_slice<T, D>(p, cut, at, memory, memory_at, rank, slice);
    wait_for_previous_kernel();  // in blocks without work too: when this kernel has ended, so has that
    // No block ends before all are done with its memory and its barriers.
    __syncwarp();
    appear_in_cluster();
    wait_for_cluster();
#endif
}

#ifdef __CUDACC__
template <typename T, int D>
cudaError_t launch_slices(const AttentionParams& p, const Schedule& schedule, cudaStream_t stream) {
    char* const workspace = static_cast<char*>(p.workspace);
    char* const items = workspace + schedule.features;
    using F = FeatureShape<D>;
    using S = Slice<D>;
    const auto shape = [&](int blocks, int threads, size_t shared, int cluster) -> LaunchShape {
        return {dim3(static_cast<unsigned>(blocks)), threads, shared, cluster, schedule.overlap};
    };
    const cudaError_t status =
        launch_kernel(slice_features_kernel<T, D>, shape(schedule.feature_blocks, F::kThreads, F::kShared, F::kBlocks),
                      stream, p, items);
    if (status != cudaSuccess) return status;
    const SliceCut cut = {{schedule.segments, schedule.segment_chunks,
                           reinterpret_cast<float*>(workspace + schedule.states)},
                          items};
    return launch_kernel(slices_kernel<T, D>, shape(schedule.blocks, S::kThreads, S::kShared, S::kBlocks), stream, p,
                         cut);
}
#endif

}  // namespace dijiang::prefill::hopper::slices
