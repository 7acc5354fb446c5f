// The blocks that share a row: one block, or a thread block cluster where there are clusters.
//
// What blocks tell each other they send into each other's shared memory, each to a place of its own that is used once:
// reading from afar takes twice as long, and a barrier of the cluster several times as long.
#pragma once

#include "device/cluster.cuh"
#include "sampling/sampling.h"

namespace dijiang {

constexpr int kLeastThreads = 512, kMostThreads = 1024;  // of a block: the one or the other, see cut_sample
constexpr int kMostWarps = kMostThreads / 32;
constexpr int kPortableTeam = 8;  // the largest cluster that every such GPU takes
constexpr int kMostTeam = 16;     // where the GPU says that it takes them
static_assert(kMostTeam <= kLeastThreads / 32);

// Of this block; launches tell, so that there is one kernel for both.
__device__ __forceinline__ int block_threads() { return static_cast<int>(blockDim.x); }
__device__ __forceinline__ int block_warps() { return static_cast<int>(blockDim.x / 32); }
__device__ __forceinline__ int warp_bits() { return 31 - __clz(block_warps()); }

struct Team {
    int size;

    // Asked anew each time: registers are scarce.
    __device__ int rank() const { return size > 1 ? cluster_block() : 0; }
    __device__ int bits() const { return 31 - __clz(size); }  // size is a power of two

    // Before anything is sent, blocks must know of each other that they run: the first half of that. The first thread
    // has made the arrivals.
    __device__ void appear() const {
        if (size > 1) appear_in_cluster();
    }
    __device__ void have_appeared() const {
        if (size > 1) wait_for_cluster();
    }

    // A barrier for all threads of all blocks; what they wrote to any shared memory is visible behind it.
    __device__ void sync() const {
        if (size > 1) {
            arrive_at_cluster();
            wait_for_cluster();
        } else {
            __syncthreads();
        }
    }

    // The same shared variable of another block.
    template <typename T> __device__ T* of(T* shared, int other) const {
        return size > 1 ? in_block(shared, other) : shared;
    }

    // One warp of each block calls: what all its lanes hold is in places[rank] of all blocks, for those who have
    // awaited that.
    __device__ void tell(uint4* places, const uint4& mine, uint64_t* arrival) const {
        const int lane = static_cast<int>(threadIdx.x % 32);
        if (lane >= size) return;
        if (size > 1) send(places + rank(), mine, lane, arrival);
        else *places = mine;
    }
    // What all blocks have sent is here. Alone: what all threads have.
    __device__ void await(uint64_t* arrival) const {
        if (size > 1) await_arrival(arrival);
        else __syncthreads();
    }
};

// The counters of what blocks send, each used once.
struct Arrivals {
    uint64_t reports, parts, totals, sums[2], entries, few_counts, few_lengths, few_entries;

    // By one thread, before the blocks appear. How many entries there are is not known yet.
    __device__ void make(int team, int bins, int few_bins) {
        make_arrival(&reports);
        make_arrival(&parts);
        make_arrival(&totals);
        make_arrival(&sums[0]);
        make_arrival(&sums[1]);
        make_arrival(&entries);
        make_arrival(&few_counts);
        make_arrival(&few_lengths);
        make_arrival(&few_entries);
        expect_arrival(&reports, 16 * team);
        expect_arrival(&parts, 16 * bins);
        expect_arrival(&totals, 16 * bins);
        expect_arrival(&sums[0], 16 * team);
        expect_arrival(&sums[1], 16 * team);
        expect_arrival(&few_counts, 2 * few_bins * team);
        expect_arrival(&few_lengths, 16 * team);
    }
};

// A number of tokens and their weight, in the order in which filters take tokens.
struct alignas(16) Tally {
    uint32_t count, unused;
    uint64_t weight;

    __device__ uint4 words() const {
        return {count, 0, static_cast<uint32_t>(weight), static_cast<uint32_t>(weight >> 32)};
    }
    __device__ Tally operator+(const Tally& other) const { return {count + other.count, 0, weight + other.weight}; }
    __device__ Tally operator-(const Tally& other) const { return {count - other.count, 0, weight - other.weight}; }
};

__device__ __forceinline__ uint64_t shuffle(uint64_t x, int lane) {
    const uint32_t low = __shfl_sync(~0u, static_cast<uint32_t>(x), lane);
    return uint64_t{__shfl_sync(~0u, static_cast<uint32_t>(x >> 32), lane)} << 32 | low;
}
__device__ __forceinline__ Tally shuffle_xor(const Tally& x, int by) {
    const uint32_t low = __shfl_xor_sync(~0u, static_cast<uint32_t>(x.weight), by);
    const uint32_t high = __shfl_xor_sync(~0u, static_cast<uint32_t>(x.weight >> 32), by);
    return {__shfl_xor_sync(~0u, x.count, by), 0, uint64_t{high} << 32 | low};
}
__device__ __forceinline__ uint64_t shuffle_up(uint64_t x, int by) {
    const uint32_t low = __shfl_up_sync(~0u, static_cast<uint32_t>(x), by);
    return uint64_t{__shfl_up_sync(~0u, static_cast<uint32_t>(x >> 32), by)} << 32 | low;
}

__device__ __forceinline__ Tally shuffle(const Tally& x, int lane) {
    return {__shfl_sync(~0u, x.count, lane), 0, shuffle(x.weight, lane)};
}

// Sums over the lanes up to this one.
__device__ __forceinline__ uint64_t warp_running(uint64_t x) {
    const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
        const uint64_t other = shuffle_up(x, by);
        if (lane >= by) x += other;
    }
    return x;
}
__device__ __forceinline__ Tally warp_running(Tally x) {
    const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
        const Tally other = {__shfl_up_sync(~0u, x.count, by), 0, shuffle_up(x.weight, by)};
        if (lane >= by) x = x + other;
    }
    return x;
}
// Of numbers below 2^62, whose sum is too: in parts of 21 bits, which 32 of fit a word.
__device__ __forceinline__ uint64_t warp_sum(uint64_t x) {
    constexpr uint32_t kPart = (1u << 21) - 1;
    const uint32_t low = __reduce_add_sync(~0u, static_cast<uint32_t>(x) & kPart);
    const uint32_t middle = __reduce_add_sync(~0u, static_cast<uint32_t>(x >> 21) & kPart);
    const uint32_t high = __reduce_add_sync(~0u, static_cast<uint32_t>(x >> 42));
    return low + (uint64_t{middle} << 21) + (uint64_t{high} << 42);
}

}  // namespace dijiang
