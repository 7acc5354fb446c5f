// Heads of 256: a kernel of its own finds the features, and producer warps only fetch them and find the scores.
#pragma once

#include "attention/prefill/fused_producer.cuh"

namespace dijiang::prefill {

template <typename T, int D>
__device__ __forceinline__ void
fetch(const AttentionParams& p, const Cut& cut, const Place& at, char* shared, int warp) {
    using S = Shape<D>;
    constexpr int kPitch = S::kPitch, kMembers = 32 * S::kWarps;
    const int lane = threadIdx.x % 32, head = at.first_head;
    const int chunks = (p.length + kChunk - 1) / kChunk, all_heads = p.num_heads + p.num_kv_heads;
    const int kv = p.num_heads + at.kv_head[0];
    const T* source = static_cast<const T*>(cut.features) + static_cast<int64_t>(at.row) * all_heads * chunks * kChunk * D;
    const T* k_source = source + static_cast<int64_t>(kv) * chunks * kChunk * D;
    const T* q_source = source + static_cast<int64_t>(head) * chunks * kChunk * D;

    const auto load = [&](int chunk, bool full, int stage) {
        const uint32_t to = shared_address(shared + S::kFeatures) + stage * S::kStage + 2 * (16 * warp * kPitch + 8 * lane);
        const int64_t from = (static_cast<int64_t>(chunk) * kChunk + 16 * warp) * D + 8 * lane;
#pragma unroll 4
        for (int t = 0; t < 16; ++t) {  // a row of 256 is one vector per lane
            copy_async(to + 2 * t * kPitch, k_source + from + t * D, true);
            if (full) copy_async(to + S::kTile + 2 * t * kPitch, q_source + from + t * D, true);
        }
        commit_copies();
    };

    int done = 0;  // chunks that were loaded
    const auto acquire = [&] {
        if (done >= 2) barrier_sync(kEmpty + 3 * (done % 2), kMembers);
        return done++ % 2;
    };
    int step = 0;
    for (int walk = at.segment + 1 < at.segments ? 1 : 2; walk <= 2; ++walk) {
        const bool full = walk == 2;
        if (at.first_chunk < at.last_chunk) load(at.first_chunk, full, acquire());
        for (int chunk = at.first_chunk; chunk < at.last_chunk; ++chunk) {
            if (chunk + 1 < at.last_chunk) {
                load(chunk + 1, full, acquire());
                wait_copies<1>();
            } else {
                wait_copies<0>();
            }
            const ChunkTerms decay(shared, S::kTerms, step);
            if (warp == 0) make_terms<T>(p, at, head, chunk, decay);
            barrier_sync(kProduced, 32 * S::kProducers);
            if (full) {
                const uint32_t tile = shared_address(shared + S::kFeatures) + (step & 1) * S::kStage;
                const uint32_t queries = tile + S::kTile + 2 * 16 * warp * kPitch + lane_by_row(kPitch);
                T* scores = reinterpret_cast<T*>(shared + S::kScores + (step & 1) * S::kStage);
                write_scores<T, D>(decay, queries, tile + lane_by_column(kPitch), scores, warp);
            }
            barrier_arrive(kFull + 3 * (step & 1), kMembers);
            ++step;
        }
    }
}

// phi(u) of every query and key head, times kFeatureUnit. A block keeps P and takes 128 tokens of a head at a time.
template <typename T, int D>
__global__ void __launch_bounds__(256, 1) wide_features_kernel(const __grid_constant__ AttentionParams p, T* features) {
    using S = Shape<D>;
    constexpr int kPitch = S::kPitch, N = D / 8, kRows = 128;
    extern __shared__ __align__(16) char shared[];
    __shared__ float4 turns[128];
    prepare_rotation(p, turns);
    const RotaryLane low(p.rotary_dim / 2, 0), high(p.rotary_dim / 2, 64);
    load_proj<T, D, 16>(p, reinterpret_cast<T*>(shared));
    __syncthreads();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, c = 2 * (lane % 4), d = p.head_dim;
    T* rows = reinterpret_cast<T*>(shared) + D * kPitch + 16 * warp * kPitch;
    const uint32_t rows_at = shared_address(rows), proj_at = shared_address(shared) + lane_by_row(kPitch);
    const int chunks = (p.length + kChunk - 1) / kChunk, tiles = (p.length + kRows - 1) / kRows;
    const int heads = p.num_heads + p.num_kv_heads;
    for (int work = blockIdx.x; work < tiles * heads * p.batch; work += gridDim.x) {
        const int tile = work % tiles, head = work / tiles % heads, row = work / tiles / heads;
        const int length = min(max(p.seq_lens[row], 0), p.length), first = tile * kRows + 16 * warp;
        if (first / kChunk * kChunk >= length) continue;  // nobody reads this chunk
        const T* source = static_cast<const T*>(p.qkv) + row * p.qkv_batch_stride + head * d + 8 * lane;
#pragma unroll 4
        for (int t = 0; t < 16; ++t) {
            const bool there = first + t < length && 8 * lane < d;
            copy_async(rows_at + 2 * (t * kPitch + 8 * lane), there ? source + (first + t) * p.qkv_token_stride : source,
                       there);
        }
        commit_copies();
        wait_copies<0>();
        __syncwarp();
        rotate_rows<T>(low, p.rotary_dim / 2, turns, rows, kPitch, p.positions[row] + first);
        rotate_rows<T>(high, p.rotary_dim / 2, turns, rows, kPitch, p.positions[row] + first);
        __syncwarp();
        float sum[N][4];
        uint32_t packed[N][2];
        project<T, D>(sum, rows_at + lane_by_row(kPitch), proj_at);
        softmax_rows<T, N>(sum, packed, d);
        __syncwarp();
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int h = 0; h < 2; ++h)
                *reinterpret_cast<uint32_t*>(rows + (g + 8 * h) * kPitch + 8 * n + c) = packed[n][h];
        __syncwarp();
        T* to = features + ((static_cast<int64_t>(row) * heads + head) * chunks * kChunk + first) * D + 8 * lane;
#pragma unroll 4
        for (int t = 0; t < 16; ++t)
            *reinterpret_cast<uint4*>(to + t * D) = *reinterpret_cast<const uint4*>(rows + t * kPitch + 8 * lane);
        __syncwarp();
    }
}

template <typename T, int D>
cudaError_t launch_wide_features(const AttentionParams& p, const Schedule& schedule, int multiprocessors, cudaStream_t stream) {
    const auto kernel = wide_features_kernel<T, D>;
    constexpr size_t kShared = 2 * (D + 128) * Shape<D>::kPitch;
    const cudaError_t status = allow_shared_memory(reinterpret_cast<const void*>(kernel), kShared);
    if (status != cudaSuccess) return status;
    const int64_t work = int64_t{(p.length + 127) / 128} * (p.num_heads + p.num_kv_heads) * p.batch;
    const int blocks = static_cast<int>(work < multiprocessors ? work : multiprocessors);
    kernel<<<blocks, 256, kShared, stream>>>(p, reinterpret_cast<T*>(static_cast<char*>(p.workspace) + schedule.features));
    return cudaGetLastError();
}

}  // namespace dijiang::prefill
