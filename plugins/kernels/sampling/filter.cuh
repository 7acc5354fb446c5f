// Rows of which many tokens may be kept: top-k and top-p find the place from which on they are.
#pragma once

#include "sampling/sampler.cuh"

namespace dijiang {

// memory.running and .all of a row: once as the first, and once as the second histogram.
template <bool kWeights> __device__ __forceinline__ void tally(const Sampler& it, int turn) {
    SelectMemory& memory = it.memory.select;
    {
        const SelectedRow row = memory.row;
        histogram<kWeights>(it.part(), row.softmax, memory,
                            [&](float exponent, float, int) { return row.bin_at(exponent); });
    }
    add_up(it.team(), it.memory.arrivals, memory, turn);
    if (threadIdx.x < 32) {
        const Tally all = warp_sum(memory.running[32 * threadIdx.x + 31]);
        if (threadIdx.x == 0) memory.all = all;
    }
}

// Keeps the best tokens until their number, or their weight, reaches memory.target >= 1; all if that is not to be
// reached. At most once for each filter, 0 first; the second keeps no more than the first.
__device__ __forceinline__ void select(const Sampler& it, int filter, bool by_count) {
    SelectMemory& memory = it.memory.select;
    if (amount(memory.all, by_count) < memory.target) {
        __syncthreads();  // the next filter has another target
        return;
    }
    reach(memory, memory.running, {}, by_count);
    const bool many = memory.inside.count > kListed;
    if (many) {
        if (threadIdx.x == 0) memory.part = it.part();
        __syncthreads();
        narrow(memory, it.cut.per_warp, it.cut.team, by_count);
    }
    const int bin = memory.bin;
    list_places(it.part(), it.team(), it.memory.arrivals, memory, filter, [&](float exponent, float score, int id) {
        if (!many) return memory.row.bin_at(exponent) == bin;
        const uint64_t place = place_of(score, id);
        return place >= memory.low_place && place <= memory.high_place;
    });
    cut_list(memory, by_count);
}

// top-k, and then top-p of what that left: memory.select.place is where the tokens begin that are kept.
// memory.select.row is there.
__device__ __forceinline__ void filter(const Sampler& it) {
    SelectMemory& memory = it.memory.select;
    tally<true>(it, 1);
    if (threadIdx.x == 0) memory.kept = memory.all.weight;
#pragma unroll 1
    for (int number = 0; number < kFilters; ++number) {
        const bool by_count = number == 0;
        if (by_count ? !it.has_top_k() : !it.has_top_p()) continue;
        if (threadIdx.x == 0) {
            const uint64_t total = memory.kept;
            const double share = ceil(it.option(&dijiang_sampling_options::top_p) * static_cast<double>(total));
            const uint64_t weight = min(max(static_cast<uint64_t>(share), uint64_t{1}), total);
            memory.target =
                by_count ? static_cast<uint64_t>(it.option(&dijiang_sampling_options::top_k)) : weight;
        }
        __syncthreads();
        select(it, number, by_count);
    }
}

}  // namespace dijiang
