// Functions are out of line where they are called from many places: this code runs once per launch, and
// fetching it takes longer than calling.
//
// The blocks that share a row: one block, or a thread block cluster where there are clusters (compute
// capability 9.0).
#pragma once

#include <cooperative_groups.h>

namespace dijiang {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kMostTeam = 8;  // the largest cluster that every such GPU takes

struct Team {
    int rank, size;

    __device__ static Team mine(int size) {
#if __CUDA_ARCH__ >= 900
        return {size > 1 ? static_cast<int>(cooperative_groups::this_cluster().block_rank()) : 0, size};
#else
        return {0, 1};
#endif
    }

    // A barrier for all threads of all blocks; what they wrote to shared memory is visible behind it.
    __device__ void sync() const { barrier(size > 1); }

    __device__ static __noinline__ void barrier(bool several) {
#if __CUDA_ARCH__ >= 900
        if (several) {
            cooperative_groups::this_cluster().sync();
            return;
        }
#endif
        __syncthreads();
    }

    // The same shared variable of another block.
    template <typename T>
    __device__ T* of(T* shared, int other) const {
#if __CUDA_ARCH__ >= 900
        if (size > 1) return cooperative_groups::this_cluster().map_shared_rank(shared, other);
#endif
        return shared;
    }
};

// A number of tokens and their weight, in the order in which filters take tokens.
struct Tally {
    uint32_t count;
    uint64_t weight;

    __device__ Tally operator+(const Tally& other) const {
        return {count + other.count, weight + other.weight};
    }
};

__device__ __forceinline__ Tally shuffle_up(const Tally& tally, int by) {
    return {__shfl_up_sync(~0u, tally.count, by), __shfl_up_sync(~0u, tally.weight, by)};
}

// The sum over the lanes up to this one.
__device__ __noinline__ Tally warp_running(Tally tally) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
        const Tally other = shuffle_up(tally, by);
        if (lane >= by) tally = tally + other;
    }
    return tally;
}

// The sum over the threads up to this one. `scratch`: one per warp; free again after the next
// __syncthreads().
__device__ __noinline__ Tally block_running(Tally mine, Tally* scratch) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const Tally inside = warp_running(mine);
    if (lane == 31) scratch[warp] = inside;
    __syncthreads();
    const Tally warps = warp_running(scratch[lane]);
    const Tally before = shuffle_up(warps, 1);  // lane w: all warps before w
    const Tally mine_before = {__shfl_sync(~0u, before.count, warp), __shfl_sync(~0u, before.weight, warp)};
    return warp == 0 ? inside : inside + mine_before;
}

}  // namespace dijiang
