// Rows of which top-k keeps few tokens: all of them are listed, compared with each other, and drawn from, in every
// block alike.
#pragma once

#include "sampling/filter.cuh"

namespace dijiang {

constexpr int kFew = kListed - kListed / 4;  // of top-k: the last bin may have more

// Each listed token is compared with all, by as many lanes as there are for it.
struct Candidate {
    int index, first, step;  // of the token, and of the tokens that this lane looks at
    uint64_t place;          // 0: there is no token

    static __device__ Candidate mine(const SelectMemory& memory) {
        const int thread = fresh_thread(), count = static_cast<int>(memory.inside.count);
        const int bits = min(__clz(max(count - 1, 1)) - 22, 5), index = thread >> bits;  // 4 to 32 lanes
        return {index, thread & ((1 << bits) - 1), 1 << bits, index < count ? memory.places[index] : 0};
    }
    __device__ bool speaks() const { return place != 0 && first == 0; }
    __device__ Tally over_its_lanes(Tally x) const {
#pragma unroll 1
        for (int by = step / 2; by > 0; by /= 2)
            x = x + Tally{__shfl_xor_sync(~0u, x.count, by), 0, shuffle_xor(x.weight, by)};
        return x;
    }
};
__device__ __forceinline__ int id_of_place(uint64_t place) { return static_cast<int>(~static_cast<uint32_t>(place)); }

// Writes the row's token and is true, or there are more tokens than can be listed. memory.select.row is there.
__device__ __forceinline__ bool choose_of_few(const Sampler& it) {
    SelectMemory& memory = it.memory.select;
    tally<false>(it, 0);
    if (threadIdx.x == 0)
        memory.target = min(it.option(&dijiang_sampling_options::top_k), static_cast<int>(memory.all.count));
    __syncthreads();
    reach(memory, memory.running, {}, true);
    const uint32_t count = memory.before.count + memory.inside.count;
    if (count > kListed) return false;
    const int bin = memory.bin;
    __syncthreads();  // all have seen that
    if (threadIdx.x == 0) memory.inside.count = count;
    __syncthreads();
    list_places(it.part(), it.team(), it.memory.arrivals, memory, 0,
                [&](float exponent, float, int) { return memory.row.bin_at(exponent) <= bin; });

    const Candidate candidate = Candidate::mine(memory);
    Tally better = {};
#pragma unroll 2
    for (uint32_t i = candidate.first; i < count; i += candidate.step)
        if (memory.places[i] > candidate.place) better = better + Tally{1, 0, memory.weights[i]};
    better = candidate.over_its_lanes(better);
    const uint64_t own = candidate.place == 0 ? 0 : memory.weights[candidate.index];
    if (candidate.speaks() && better.count == memory.target - 1) {  // the last that top-k keeps
        const uint64_t total = better.weight + own;
        const double share = ceil(it.option(&dijiang_sampling_options::top_p) * static_cast<double>(total));
        memory.kept = it.has_top_p() ? min(max(static_cast<uint64_t>(share), uint64_t{1}), total) : ~uint64_t{0};
    }
    __syncthreads();
    if (candidate.speaks() && (better.count >= memory.target || better.weight >= memory.kept ||
                               own < it.numbers().least_weight))
        memory.weights[candidate.index] = 0;
    __syncthreads();

    uint64_t lower = 0, total = 0;
    const int id = id_of_place(candidate.place);
#pragma unroll 2
    for (uint32_t i = candidate.first; i < count; i += candidate.step) {
        const uint64_t weight = memory.weights[i];
        total += weight;
        if (id_of_place(memory.places[i]) < id) lower += weight;
    }
    lower = candidate.over_its_lanes({0, 0, lower}).weight;
    total = candidate.over_its_lanes({0, 0, total}).weight;
    const uint64_t place = place_below(total, it.memory.draw.random);
    if (candidate.speaks() && it.team().rank() == 0 && lower <= place &&
        place - lower < memory.weights[candidate.index])
        it.write(DIJIANG_ROW_OK, id);
    return true;
}

}  // namespace dijiang
