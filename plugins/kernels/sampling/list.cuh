// Where filters cut a row, exactly: the tokens of the bins in question are listed in every block and compared.
#pragma once

#include "sampling/order.cuh"
#include "sampling/sampler.cuh"

namespace dijiang {

// How the lists of a row's blocks, and what is made of them, are shared out: `slices` warps for each block's list.
struct Lists {
    int capacity;  // of one
    int length;    // of this lane's block's; 0 where there is no such block

    static __device__ int room(const Team& team) { return min(kListed, kLists >> team.bits()); }
    static __device__ Lists of(const Team& team, const uint4* sums) {
        const int lane = fresh_lane(), capacity = room(team);
        return {capacity, lane < team.size ? min(static_cast<int>(sums[lane].z), capacity) : 0};
    }
    __device__ int before(int rank) const {
        const int lane = fresh_lane();
        return static_cast<int>(__reduce_add_sync(~0u, static_cast<uint32_t>(lane < rank ? length : 0)));
    }
};

// Lists the tokens that `bounds` names, in memory.select.entries, and sums what the better ones weigh: in
// memory.draw.warps and .sums. False if they are too many; then nothing is listed. All warps have the same bounds.
__device__ __forceinline__ bool list_tokens(const Sampler& it, const Bounds& bounds) {
    SelectMemory& memory = it.memory.select;
    const Team team = it.team();
    const int rank = team.rank(), capacity = Lists::room(team);
    uint64_t* const own = memory.lists + rank * capacity;
    uint64_t sum = 0;
    {
        const SelectedRow row = memory.row;
        const uint64_t least_weight = it.choice().least_weight;
        const float first = beginning_of(bounds.first), end = beginning_of(bounds.first + bounds.span + 1);
        const float other = bounds.other < 0 ? INFINITY : beginning_of(bounds.other);
        const float other_end = beginning_of(bounds.other + 1);
        it.part().each([&](int id, const auto& scores) {
            constexpr int kCount = sizeof scores / sizeof *scores;
            float exponents[kCount];
            bool better[kCount], any = false;
            uint32_t chosen = 0;  // a bit for each
#pragma unroll
            for (int j = 0; j < kCount; ++j) {
                exponents[j] = row.softmax.exponent(scores[j]);
                const float at = row.place_at(exponents[j]);
                better[j] = at < first;
                any |= better[j];
                const bool here = ((at >= first) & (at < end)) | ((at >= other) & (at < other_end));  // no branches
                chosen |= here & row.softmax.has_weight(exponents[j]) ? 1u << j : 0u;
            }
            if (any) {
#pragma unroll
                for (int j = 0; j < kCount; ++j) {
                    const uint64_t weight = row.softmax.weight_at(exponents[j]);  // of what has none: 0
                    sum += better[j] && weight >= least_weight ? weight : 0;
                }
            }
#pragma unroll 1
            for (; chosen != 0; chosen &= chosen - 1) {
                const int which = __ffs(static_cast<int>(chosen)) - 1;
                float score = scores[0];
#pragma unroll
                for (int j = 1; j < kCount; ++j)
                    if (which == j) score = scores[j];
                const uint32_t at = atomicAdd(&memory.listed, 1u);
                if (at < static_cast<uint32_t>(capacity)) own[at] = place_of(score, id + 32 * which);
            }
        });
    }
    tell_sums(team, it.memory.draw, it.memory.draw.sums, &it.memory.arrivals.sums[0], sum, memory.listed);
    const int thread = fresh_thread(), listed = min(static_cast<int>(memory.listed), capacity);
    if (team.size > 1) {
#pragma unroll 1
        for (int i = thread; i < listed << team.bits(); i += block_threads()) {
            const int to = i & (team.size - 1);
            if (to != rank) send(own + (i >> team.bits()), own[i >> team.bits()], to, &it.memory.arrivals.entries);
        }
    }
    team.await(&it.memory.arrivals.sums[0]);
    const uint4* const sums = it.memory.draw.sums;
    const Lists lists = Lists::of(team, sums);
    const int all = lists.before(team.size);
    if (team.size > 1) {
        if (thread == 0) expect_arrival(&it.memory.arrivals.entries, 8 * (all - listed));
        await_arrival(&it.memory.arrivals.entries);
    }
    const int lane = thread & 31;
    const bool cut_off = lane < team.size && sums[lane].z > static_cast<uint32_t>(capacity);
    if (all > kListed || __ballot_sync(~0u, cut_off) != 0) return false;

    const int slice_bits = warp_bits() - team.bits(), warp = thread >> 5, block = warp >> slice_bits;
    const int start = lists.before(block), length = static_cast<int>(__shfl_sync(~0u, lists.length, block));
#pragma unroll 1
    for (int i = thread & ((32 << slice_bits) - 1); i < length; i += 32 << slice_bits) {
        const uint64_t place = memory.lists[block * capacity + i];
        memory.entries[start + i] = {place, memory.row.softmax.weight(score_of_place(place))};
    }
    __syncthreads();
    return true;
}

// Finds memory.place, from which on tokens are kept: of the listed ones the last that top-k keeps, and of what that
// leaves the last that top-p wants.
__device__ __forceinline__ void cut_list(const Sampler& it) {
    constexpr int kCompared = 160;  // more take less time in order
    SelectMemory& memory = it.memory.select;
    const Bounds& bounds = memory.bounds;
    const int count = Lists::of(it.team(), it.memory.draw.sums).before(it.team().size);
    const Ordered one = count <= kCompared ? compare_all(memory.entries, count) : order(memory, count);
    const Entry own = one.own;
    const bool speaks = one.there;
    const float exponent = memory.row.softmax.exponent(score_of_place(own.place));
    const bool behind = speaks && memory.row.bin_at(exponent) == bounds.other;
    const Tally before = one.before + (behind ? bounds.between : bounds.before);
    uint64_t total = memory.kept;
    if (bounds.by_count) {
        if (speaks && before.count + 1 == static_cast<uint32_t>(it.choice().top_k)) {
            memory.place = own.place;
            memory.target = before.weight + own.weight;
        }
        __syncthreads();
        total = memory.target;
    }
    if (it.choice().has_top_p != 0) {
        const uint64_t target = it.choice().top_p_of(total);
        if (speaks && before.weight < target && target <= before.weight + own.weight) memory.place = own.place;
        __syncthreads();
    }
}

// memory.draw.shares: what each block's tokens weigh that are kept, a warp's share each, those that are not listed in
// the first of a block's.
__device__ __forceinline__ void share_out(const Sampler& it, uint64_t kept_from) {
    const SelectMemory& memory = it.memory.select;
    const uint4* const sums = it.memory.draw.sums;
    const Team team = it.team();
    const Lists lists = Lists::of(team, sums);
    const int thread = fresh_thread(), warp = thread >> 5;
    const int slice_bits = warp_bits() - team.bits(), block = warp >> slice_bits;
    const int start = lists.before(block), length = static_cast<int>(__shfl_sync(~0u, lists.length, block));
    const uint64_t least_weight = it.choice().least_weight;
    uint64_t sum = 0;
#pragma unroll 1
    for (int i = thread & ((32 << slice_bits) - 1); i < length; i += 32 << slice_bits) {
        const Entry entry = memory.entries[start + i];
        if (entry.place >= kept_from && entry.weight >= least_weight) sum += entry.weight;
    }
    sum = warp_sum(sum);
    const bool is_first = warp == block << slice_bits;
    if ((thread & 31) == 0) it.memory.draw.shares[warp] = sum + (is_first ? weight_of(sums[block]) : 0);
    __syncthreads();
}

// memory.draw.finally of this block's warps.
__device__ __forceinline__ void add_listed(const Sampler& it, uint64_t kept_from) {
    const SelectMemory& memory = it.memory.select;
    const Team team = it.team();
    const Lists lists = Lists::of(team, it.memory.draw.sums);
    const int rank = team.rank(), thread = fresh_thread(), start = lists.before(rank);
    const int length = static_cast<int>(__shfl_sync(~0u, lists.length, rank));
    const Part part = it.ids();
    const uint64_t least_weight = it.choice().least_weight;
    uint64_t sum = 0;
#pragma unroll 1
    for (int i = thread & 31; i < length; i += 32) {
        const Entry entry = memory.entries[start + i];
        const int id = id_of_place(entry.place);
        if (id >= part.first && id < part.last && entry.place >= kept_from && entry.weight >= least_weight)
            sum += entry.weight;
    }
    sum = warp_sum(sum);
    if ((thread & 31) == 0) it.memory.draw.finally[thread >> 5] = sum + it.memory.draw.warps[thread >> 5];
    __syncthreads();
}

}  // namespace dijiang
