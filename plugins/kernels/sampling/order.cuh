// The listed tokens of a row in order, and what those before each weigh.
#pragma once

#include "sampling/select.cuh"

namespace dijiang {

// A listed token, and those before it in the list's order of places; `there` in one thread for each.
struct Ordered {
    Entry own;
    Tally before;
    bool there;
};

// How each of `count` is compared with all: by as many lanes as there are for it.
struct Shared {
    int index, first, lanes;  // which this thread is for, what it looks at first, and how far the next is

    static __device__ Shared among(int count) {
        const int thread = fresh_thread(), bits = min(__clz(max(count - 1, 1)) + warp_bits() - 27, 5);
        return {thread >> bits, thread & ((1 << bits) - 1), 1 << bits};
    }
};

__device__ __forceinline__ Ordered compare_all(const Entry* entries, int count) {
    const Shared by = Shared::among(count);
    Ordered it{};
    if (by.index < count) {
        it.own = entries[by.index];
#pragma unroll 4
        for (int i = by.first; i < count; i += by.lanes) {
            const Entry other = entries[i];
            if (other.place > it.own.place) it.before = it.before + Tally{1, 0, other.weight};
        }
    }
    __syncwarp();
#pragma unroll 1
    for (int lane = by.lanes / 2; lane > 0; lane /= 2) it.before = it.before + shuffle_xor(it.before, lane);
    it.there = by.index < count && by.first == 0;
    return it;
}

// Many are compared with those of their own bin alone, of as many bins again in place of the few that were listed. A
// thread for each; the histogram's memory and the blocks' lists are free for it.
__device__ __forceinline__ Ordered order(SelectMemory& memory, int count) {
    constexpr int kHalf = kBins / 2;  // of the bins are for Bounds::other
    Entry* const entries = reinterpret_cast<Entry*>(memory.lists);
    uint64_t* const sums = reinterpret_cast<uint64_t*>(memory.high);  // of warps
    const Bounds& bounds = memory.bounds;
    const int thread = fresh_thread(), lane = thread & 31;
    for (int bin = thread; bin < kBins; bin += block_threads()) memory.counts[bin] = 0;
    __syncthreads();
    Ordered it{};
    it.there = thread < count;
    int bin = 0, slot = 0;
    if (it.there) {
        it.own = memory.entries[thread];
        const float at = memory.row.place_at(memory.row.softmax.exponent(score_of_place(it.own.place)));
        const auto first = static_cast<float>(bounds.first), other = static_cast<float>(bounds.other);
        const bool behind = bounds.other >= 0 && at >= other;
        const float within = behind ? at - other : __fdividef(at - first, static_cast<float>(bounds.span + 1));
        bin = min(__float2int_rz(within * kHalf), kHalf - 1) + (behind ? kHalf : 0);
        slot = static_cast<int>(atomicAdd(&memory.counts[bin], 1u));
    }
    __syncthreads();
    for (int i = thread; i < kBins; i += block_threads())
        memory.low[i] = static_cast<uint32_t>(warp_running(uint64_t{memory.counts[i]}));
    __syncthreads();
    const uint64_t of_group = memory.low[32 * lane + 31];
    const auto before_group = static_cast<uint32_t>(warp_running(of_group) - of_group);
    const int group = static_cast<int>(__shfl_sync(~0u, before_group, bin >> 5));
    const int start = group + (bin % 32 == 0 ? 0 : static_cast<int>(memory.low[max(bin - 1, 0)]));
    if (it.there) entries[start + slot] = it.own;
    __syncthreads();
    int rank = start;
    if (it.there) {
        const int end = start + static_cast<int>(memory.counts[bin]);
#pragma unroll 1
        for (int i = start; i < end; ++i) rank += entries[i].place > it.own.place ? 1 : 0;
    }
    __syncthreads();
    if (it.there) entries[rank] = it.own;
    __syncthreads();
    it.own = it.there ? entries[thread] : Entry{};
    const uint64_t running = warp_running(it.own.weight);
    if (lane == 31) sums[thread >> 5] = running;
    __syncthreads();
    const uint64_t before = warp_sum(lane < thread >> 5 ? sums[lane] : 0);
    it.before = {static_cast<uint32_t>(thread), 0, before + running - it.own.weight};
    return it;
}

}  // namespace dijiang
