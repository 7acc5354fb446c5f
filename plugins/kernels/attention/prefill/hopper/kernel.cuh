// Prefill for compute capability 9.0 where decay is geometric: everything in one kernel, on products of four warps
// (wgmma).
//
// A block walks chunks of 64 tokens of one row and one head (two of 80). Its groups of four warps hand tiles on
// through barriers in shared memory:
//   features  two groups: RoPE, phi(u) = softmax(u P), as it is and weighted for the state; decayed scores
//   states    S in accumulators: a copy for each chunk's queries, then S = gamma^64 S + phi(k)^T v
//   outputs   o = scores v + fade phi(q) S, GroupNorm and gate
// Sequences are cut in segments as in fused.cuh: keys and states walk a segment that others follow twice.
#pragma once

#include "attention/prefill/hopper/make_features.cuh"
#include "attention/prefill/hopper/outputs.cuh"
#include "attention/prefill/hopper/states.cuh"
#include "device/overlap.cuh"

namespace dijiang::prefill::hopper {

// All threads: P, rounded to T.
template <typename T, int D, int kThreads = Shape<D>::kThreads>
__device__ __forceinline__ void load_proj(const AttentionParams& p, char* proj) {
    using S = Shape<D>;
#pragma unroll 4
    for (int i = threadIdx.x; i < D * D / 8; i += kThreads) {
        const int row = i / (D / 8), column = i % (D / 8) * 8;
        const float4 x = *reinterpret_cast<const float4*>(p.proj + row * D + column);
        const float4 y = *reinterpret_cast<const float4*>(p.proj + row * D + column + 4);
        *reinterpret_cast<uint4*>(proj + S::Tile::offset(D, row, column)) =
            make_uint4(pack<T>(x.x, x.y), pack<T>(x.z, x.w), pack<T>(y.x, y.y), pack<T>(y.z, y.w));
    }
}

// A warp. What any of a few rows and heads may need is asked for while the ticket is drawn.
template <int D> __device__ __forceinline__ void find_place(const AttentionParams& p, const Cut& cut, Place& at) {
    constexpr int H = Shape<D>::kHeads;
    const int lane = lane_of();
    int length = p.seq_lens[min(lane, p.batch - 1)], position = p.positions[min(lane, p.batch - 1)];
    const float log_decay = p.log_decay[min(lane, p.num_heads - 1)];
    uint32_t work = blockIdx.x;
    if (cut.segments > 1) {
        if (lane == 0) work = atomicAdd(p.sync, 1u);
        work = __shfl_sync(~0u, work, 0);
    }
    const int sets = p.num_heads / H, jobs = p.batch * sets, tokens = cut.segment_chunks * kChunk;
    const int segment = static_cast<int>(work) / jobs, job = static_cast<int>(work) - segment * jobs;
    const int row = job / sets, first_head = (job - row * sets) * H;
#pragma unroll
    for (int h = 0; h < H; ++h)
        if (lane == first_head + h) at.decay[h] = fmaxf(log_decay, kLeastLogDecay) * kLog2E;
    if (row >= 32) length = p.seq_lens[row], position = p.positions[row];
    if (lane == row % 32) {
        const int shared_by = p.num_heads / p.num_kv_heads;
        length = min(max(length, 0), p.length);
        at.segment = segment;
        at.job = job;
        at.row = row;
        at.first_head = first_head;
        at.kv_head[0] = first_head / shared_by;
        at.kv_head[1] = (first_head + 1) / shared_by;
        at.length = length;
        at.position = position;
        at.segments = max(1, (length + tokens - 1) / tokens);
        at.qkv = static_cast<const uint16_t*>(p.qkv) + row * p.qkv_batch_stride;
        at.gate = static_cast<const uint16_t*>(p.gate) + row * p.gate_batch_stride + first_head * D;
        at.output = static_cast<uint16_t*>(p.output) + row * p.output_batch_stride + first_head * D;
        at.first_token = segment * tokens;
        at.last_token = min(at.first_token + tokens, p.length);
        at.first_chunk = at.first_token / kChunk;
        at.last_chunk = (min(at.last_token, length) + kChunk - 1) / kChunk;
    }
    __syncwarp();  // or this warp would go on in two parts
}

template <int D> __device__ __forceinline__ void make_barriers(uint32_t memory_at) {
    const Barriers<D> barriers{memory_at + Shape<D>::kBarriers};
    for (int i = 0; i < Barriers<D>::kCount; ++i) make_barrier(barriers.first + 8 * i, kGroup / 32);
}

// A row without tokens: its states go over as they are.
template <int D, int kThreads = Shape<D>::kThreads>
__device__ __forceinline__ void carry_over(const AttentionParams& p, const Place& at) {
    const int64_t first = static_cast<int64_t>(at.first_head) * D * D;
    const float4* past = reinterpret_cast<const float4*>(p.past_state + at.row * p.past_batch_stride + first);
    float4* present = reinterpret_cast<float4*>(p.present_state + at.row * p.present_batch_stride + first);
    if (past == present || at.segment > 0) return;
    for (int i = threadIdx.x; i < Shape<D>::kHeads * D * D / 4; i += kThreads) present[i] = past[i];
}

// Zero output from token `first` on.
template <typename T, int D, int kThreads = Shape<D>::kThreads>
__device__ __forceinline__ void clear_padding(const AttentionParams& p, const Place& at, int first) {
    constexpr int kPieces = Shape<D>::kHeads * D / 8;
    for (int i = threadIdx.x; i < (at.last_token - first) * kPieces; i += kThreads)
        *reinterpret_cast<uint4*>(at.output + (first + i / kPieces) * p.output_token_stride + 8 * (i % kPieces)) =
            make_uint4(0, 0, 0, 0);
}

template <typename T, int D>
__device__ __forceinline__ void walk(const AttentionParams& p, const Cut& cut, const Place& at, char* memory,
                                     uint32_t memory_at) {
    using S = Shape<D>;
    static_assert(sizeof(Place) <= S::kTurns - S::kPlace && S::kShared <= 227 << 10);
    const int group = __shfl_sync(~0u, threadIdx.x / kGroup, 0);  // the same in all lanes, and known to be
    if (group == 0) {
        if constexpr (S::kTrade) take_registers<S::kStateRegisters>();
        keep_states<T, D>(p, cut, at, memory, memory_at);
        if (cut.segments > 1 && threadIdx.x < 32) leave(p, 1);
    } else if (group <= 2) {
        if constexpr (S::kTrade) give_registers<S::kFeatureRegisters>();
        make_features<T, D>(p, at, memory, memory_at, group - 1);
    } else {
        if constexpr (S::kTrade && S::kOutputRegisters < 128) give_registers<S::kOutputRegisters>();
        make_outputs<T, D>(p, at, memory, memory_at, group - 3);
    }
}

template <typename T, int D>
__global__ void __launch_bounds__(Shape<D>::kThreads, 1)
hopper_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Cut cut) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    using S = Shape<D>;
    char* const memory = block_memory();
    const uint32_t memory_at = shared_address(memory);
    Place& at = *reinterpret_cast<Place*>(memory + S::kPlace);
    let_next_kernel_start();
    if (threadIdx.x == 0) make_barriers<D>(memory_at);
    wait_for_previous_kernel();
    if (threadIdx.x < 32) find_place<D>(p, cut, at);
    prepare_rotation(p, reinterpret_cast<float4*>(memory + S::kTurns),
                     reinterpret_cast<uint32_t*>(memory + S::kLanes));
    load_proj<T, D>(p, memory + S::kProj);
    show_to_products();
    __syncthreads();
    const bool walks = at.segment < at.segments && at.length > 0;
    if (walks) walk<T, D>(p, cut, at, memory, memory_at);
    if (at.length == 0) carry_over<D>(p, at);
    const int padding = max(at.first_token, at.length);
    if (padding < at.last_token) clear_padding<T, D>(p, at, padding);
    if (!walks && cut.segments > 1 && threadIdx.x < 32) leave(p, 1);
#endif
}

#ifdef __CUDACC__
// Launches a kernel over the schedule's blocks.
template <auto kKernel>
cudaError_t launch_over(int threads, size_t shared, const AttentionParams& p, const Schedule& schedule,
                        cudaStream_t stream) {
    const Cut cut = {schedule.segments, schedule.segment_chunks,
                     reinterpret_cast<float*>(static_cast<char*>(p.workspace) + schedule.states)};
    return launch_kernel(kKernel, {dim3(static_cast<unsigned>(schedule.blocks)), threads, shared, 1, schedule.overlap},
                         stream, p, cut);
}

template <typename T, int D>
cudaError_t launch_hopper(const AttentionParams& p, const Schedule& schedule, cudaStream_t stream) {
    return launch_over<hopper_kernel<T, D>>(Shape<D>::kThreads, Shape<D>::kShared, p, schedule, stream);
}
#endif

}  // namespace dijiang::prefill::hopper
