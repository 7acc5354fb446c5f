// Prefill on tensor cores for d <= 128, everything in one kernel.
//
// A block walks chunks of 64 tokens of one row and one set of heads. Each head has four producer warps and
// D / kColumns consumer warps, which meet at named barriers:
//   producers  16 tokens each: RoPE, phi(q) and phi(k) = softmax(u P), the decayed causal scores
//   consumers  kColumns value columns each: the state, transposed, in MMA accumulators; o = scores v + e^A phi(q) S;
//              GroupNorm and gate
// If there are fewer heads than the GPU has room for, a sequence is cut in segments. Blocks first find the increment
// their segment adds to the state from k and v alone (walk 1), publish it, add up those before theirs and then do
// everything (walk 2). Blocks take their segment from a ticket, earlier segments first, so that a block only
// ever waits for blocks that have already started: no assumption about how many are resident.
#pragma once

#include "attention/prefill/fused_consumer.cuh"
#include "attention/prefill/fused_producer.cuh"
#include "attention/prefill/wide_producer.cuh"

namespace dijiang::prefill {

// All threads: zero output on this block's padding.
template <typename T, int D>
__device__ __forceinline__ void clear_padding(const AttentionParams& p, const Place& at, int first, int last) {
    const int vectors = (Shape<D>::kWide ? Shape<D>::kOwn : at.set * p.head_dim) / 8;
    T* out = static_cast<T*>(p.output) + at.row * p.output_batch_stride + at.first_head * p.head_dim
             + at.first_column;
    for (int i = fresh_thread(); i < (last - first) * vectors; i += blockDim.x) {
        const int t = i / vectors, c = i - t * vectors;
        *reinterpret_cast<uint4*>(out + (first + t) * p.output_token_stride + 8 * c) = make_uint4(0, 0, 0, 0);
    }
}

template <typename T, int D>
__global__ void __launch_bounds__(Shape<D>::kThreads, Shape<D>::kBlocks)
fused_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Cut cut) {
    using S = Shape<D>;
    extern __shared__ __align__(16) char shared[];
    // In shared memory rather than in every thread's registers, which the accumulators need.
    __shared__ Place at;
    if constexpr (!S::kWide) prepare_rotation(p, at.turns);
    if (threadIdx.x == 0) {
        const int work = cut.segments > 1 ? static_cast<int>(atomicAdd(p.sync, 1u)) : blockIdx.x;
        const int blocks = S::kWide ? p.head_dim / S::kOwn : 1;  // per set
        const int sets = p.num_heads / cut.set * blocks, jobs = p.batch * sets;
        at.segment = work / jobs;
        at.job = work - at.segment * jobs;
        at.row = at.job / sets;
        at.set = cut.set;
        at.first_head = (at.job - at.row * sets) / blocks * cut.set;
        at.first_column = (at.job - at.row * sets) % blocks * S::kOwn;
        at.length = min(max(p.seq_lens[at.row], 0), p.length);
        at.position = p.positions[at.row];
        const int shared_by = p.num_heads / p.num_kv_heads;
        at.kv_head[0] = at.first_head / shared_by;
        at.kv_head[1] = (at.first_head + 1) / shared_by;
        const int tokens = cut.segment_chunks * kChunk;  // per segment
        at.segments = max(1, (at.length + tokens - 1) / tokens);
        at.first_token = at.segment * tokens;
        at.last_token = min(at.first_token + tokens, p.length);
        at.first_chunk = at.first_token / kChunk;
        at.last_chunk = (min(at.last_token, at.length) + kChunk - 1) / kChunk;
        at.steps = max(0, at.last_chunk - at.first_chunk) * (at.segment + 1 < at.segments ? 2 : 1);
    }
    __syncthreads();

    if (at.segment < at.segments) {
        if constexpr (!S::kWide) {
            load_proj<T, D, D == 80 ? 1 : 4>(p, reinterpret_cast<T*>(shared));
            __syncthreads();
        }
        // The same in all lanes, and known to be.
        const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), unit = warp / S::kWarps, role = warp % S::kWarps;
        if (role < S::kConsumers) {
            consume<T, D>(p, cut, at, shared, unit, role);
        } else {
            if constexpr (S::kWide) {
                fetch<T, D>(p, cut, at, shared, role - S::kConsumers);
            } else {
                produce<T, D>(p, cut, at, shared, unit, role - S::kConsumers);
            }
        }
    }
    const int padding = max(at.first_token, at.length);
    if (!cut.raw && padding < at.last_token) clear_padding<T, D>(p, at, padding, at.last_token);

    if (cut.segments > 1) {
        // The last block to finish leaves the sync memory as it was found.
        __syncthreads();
        __shared__ bool final;
        if (fresh_thread() == 0) {
            __threadfence();
            final = atomicAdd(p.sync + 1, 1u) == gridDim.x - 1;
        }
        __syncthreads();
        if (final) {
            const int words = 2 + gridDim.x * cut.set * S::kConsumers;
            for (int i = fresh_thread(); i < words; i += blockDim.x) p.sync[i] = 0;
        }
    }
}

template <typename T, int D> cudaError_t launch_fused(const AttentionParams& p, const Schedule& schedule, cudaStream_t stream) {
    const auto kernel = fused_kernel<T, D>;
    const cudaError_t status = allow_shared_memory(reinterpret_cast<const void*>(kernel), schedule.shared);
    if (status != cudaSuccess) return status;
    char* workspace = static_cast<char*>(p.workspace);
    Cut cut;
    cut.set = schedule.set;
    cut.stages = schedule.stages;
    cut.head_memory = Shape<D>::kFeatures + schedule.stages * Shape<D>::kStage;
    cut.segments = schedule.segments;
    cut.segment_chunks = schedule.segment_chunks;
    cut.features = workspace + schedule.features;
    cut.raw = schedule.raw ? reinterpret_cast<float*>(workspace + schedule.outputs) : nullptr;
    cut.states = reinterpret_cast<float*>(workspace + schedule.states);
    kernel<<<schedule.blocks, schedule.threads, schedule.shared, stream>>>(p, cut);
    return cudaGetLastError();
}

}  // namespace dijiang::prefill
