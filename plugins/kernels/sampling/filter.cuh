// top-k and top-p: where the tokens end that they keep.
#pragma once

#include "sampling/list.cuh"

namespace dijiang {

// memory.select.running of a row: counts for top-k, weights for top-p.
__device__ __forceinline__ void tally(const Sampler& it, const SelectedRow& row) {
    SelectMemory& memory = it.memory.select;
    const int count = opaque(it.choice().top_k), weigh = opaque(it.choice().has_top_p);
    it.part().each([&](int, const auto& scores) {
        constexpr int kCount = sizeof scores / sizeof *scores;
        int bins[kCount];
        float exponents[kCount];
        const int nowhere = kNowhere + fresh_lane();
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
            exponents[j] = row.softmax.exponent(scores[j]);
            const int bin = row.bin_at(exponents[j]);
            bins[j] = row.softmax.has_weight(exponents[j]) ? bin : nowhere;
        }
        if (count != 0) {
#pragma unroll
            for (int j = 0; j < kCount; ++j) atomicAdd(&memory.counts[bins[j]], 1u);
        }
        if (weigh != 0) {
            uint64_t weights[kCount];
#pragma unroll
            for (int j = 0; j < kCount; ++j) weights[j] = row.softmax.weight_at(exponents[j]);
            add_weights(memory, bins, weights);
        }
    });
    add_up(it.team(), it.memory.arrivals, memory, [&] { it.memory.draw.random = it.number().bits(); });
}

// What top-p wants depends on what exactly top-k leaves, which is known once tokens are listed. Until then it is
// between two numbers, so the tokens are listed that both cuts may be at; and few they are, a bin or two for each.
__device__ __forceinline__ Bounds bounds_of(const Sampler& it) {
    const Bins bins = Bins::of(it.memory.select.running, {});
    const int top_k = it.choice().top_k;
    Bounds bounds = {kBins, 0, -1, top_k > 0 && static_cast<uint32_t>(top_k) <= bins.all.count, {}, {}};
    uint64_t least = bins.all.weight, most = least;
    if (threadIdx.x == 0) it.memory.select.kept = least;
    Cut k = {-1, {}, {}};
    if (bounds.by_count) {
        k = bins.find(static_cast<uint64_t>(top_k), true);
        least = max(k.before.weight, uint64_t{1});
        most = k.end.weight;
        bounds.first = k.bin;
        bounds.before = k.before;
    }
    if (it.choice().has_top_p != 0) {
        const uint64_t wanted = it.choice().top_p_of(fresh_thread() % 2 == 0 ? least : most);
        const uint64_t low = shuffle(wanted, 0), high = shuffle(wanted, 1);
        const Cut first = bins.find(low, false);
        Cut last = first;
        if (high != low) last = bins.find(high, false);
        bounds.first = first.bin;
        bounds.span = last.bin - first.bin;
        bounds.before = first.before;
        if (k.bin > last.bin) {
            bounds.other = k.bin;
            bounds.between = k.before - (last.end - first.before);
        }
    }
    if (threadIdx.x == 0) it.memory.select.bounds = bounds;
    return bounds;
}

// memory.select.place for bins with more tokens than can be listed: of one filter after the other.
__device__ __forceinline__ void cut_crowded(const Sampler& it) {
    SelectMemory& memory = it.memory.select;
#pragma unroll 1
    for (int number = 0; number < 2; ++number) {
        const bool by_count = number == 0;
        if (by_count ? !memory.bounds.by_count : it.choice().has_top_p == 0) continue;
        const uint64_t target = by_count ? static_cast<uint64_t>(it.choice().top_k) : it.choice().top_p_of(memory.kept);
        const Cut cut = Bins::of(memory.running, {}).find(target, by_count);
        if (threadIdx.x == 0) {
            memory.bin = cut.bin;
            memory.before = cut.before;
            memory.target = target;
            memory.part = it.part();
        }
        __syncthreads();
        narrow(memory, it.cut.per_warp, it.cut.team, by_count);
    }
}

// Finds memory.select.place, where the tokens begin that are kept. True: memory.draw tells what is kept but for what is
// listed, which is in memory.select.entries.
__device__ __forceinline__ bool filter(const Sampler& it, const SelectedRow& row) {
    if (threadIdx.x == 0) it.memory.select.row = row;
    tally(it, row);
    if (!list_tokens(it, bounds_of(it))) {
        cut_crowded(it);
        return false;
    }
    cut_list(it);
    return true;
}

}  // namespace dijiang
