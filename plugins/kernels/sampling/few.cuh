// Rows of which top-k keeps few tokens. What each thread has found best bounds them: tokens that are better than the
// k-th best of these are hardly more than k. They are listed in the row's first block, which compares them, cuts them
// and draws from them, without a pass over all tokens.
#pragma once

#include "sampling/order.cuh"
#include "sampling/sampler.cuh"

namespace dijiang {

// A bin for the filters' kFewPerBin. Counts that blocks tell are halves of words: a row has fewer threads than 2^16.
constexpr int kFewPerBin = kBins / kFewBins;
static_assert(kFewBins == 32 * 8 && kMostTeam * kMostThreads < 1 << 16);

__device__ __forceinline__ float beginning_of_few(int bin) {
    return bin < kFewBins ? static_cast<float>(kFewPerBin * bin) : INFINITY;
}

// Where the bins end, for SelectedRow::place_at, that together have the best of `top_k` threads of the row, or of all
// that have any. In memory.end, for all threads.
__device__ __forceinline__ void bound_few(const Sampler& it, float at, bool weighs) {
    FewMemory& memory = it.memory.few;
    const Team team = it.team();
    if (weighs) atomicAdd(&memory.counts[min(kFewBins - 1, __float2int_rz(at * (1.0f / kFewPerBin)))], 1u);
    __syncthreads();
    const int thread = fresh_thread(), lane = thread & 31, warp = thread >> 5;
    if (warp < team.size) {  // to a block each
        const uint4 low = *reinterpret_cast<const uint4*>(memory.counts + 8 * lane);
        const uint4 high = *reinterpret_cast<const uint4*>(memory.counts + 8 * lane + 4);
        const uint4 mine = {low.x | low.y << 16, low.z | low.w << 16, high.x | high.y << 16, high.z | high.w << 16};
        uint4* const to = memory.told + 32 * team.rank() + lane;
        if (team.size > 1) send(to, mine, warp, &it.memory.arrivals.few_counts);
        else *to = mine;
    }
    if (warp == 0) {
        if (team.size > 1) await_arrival(&it.memory.arrivals.few_counts);
        uint4 sums = {0, 0, 0, 0};
#pragma unroll 4
        for (int rank = 0; rank < team.size; ++rank) {
            const uint4 words = memory.told[32 * rank + lane];
            sums = {sums.x + words.x, sums.y + words.y, sums.z + words.z, sums.w + words.w};
        }
        const uint32_t words[4] = {sums.x, sums.y, sums.z, sums.w};
        uint32_t own = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) own += (words[i] & 0xFFFF) + (words[i] >> 16);
        const auto all = static_cast<uint32_t>(warp_running(uint64_t{own}));
        const auto top_k = static_cast<uint32_t>(it.choice().top_k);
        const int at_lane = __popc(__ballot_sync(~0u, all < top_k));
        if (lane == min(at_lane, 31)) {
            int bin = 8 * lane;
            uint32_t running = all - own;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                running += i % 2 == 0 ? words[i / 2] & 0xFFFF : words[i / 2] >> 16;
                bin += running < top_k ? 1 : 0;
            }
            memory.end = beginning_of_few(bin + 1);  // behind the last bin where all that have weight are fewer
        }
    }
    __syncthreads();
}

// Lists the tokens that lie before memory.end, in memory.entries of the row's first block. -1: they are too many;
// otherwise how many they are. any: this thread may have some.
__device__ __forceinline__ int list_few(const Sampler& it, const SelectedRow& row, bool any) {
    FewMemory& memory = it.memory.few;
    const Team team = it.team();
    const int rank = team.rank(), capacity = min(kFewListed, kFewLists >> team.bits());
    uint64_t* const own = memory.lists + rank * capacity;
    if (any) {
        const float end = memory.end;
        it.part().each([&](int id, const auto& scores) {
            constexpr int kCount = sizeof scores / sizeof *scores;
#pragma unroll
            for (int j = 0; j < kCount; ++j) {
                const float exponent = row.softmax.exponent(scores[j]);
                if (!(row.place_at(exponent) < end && row.softmax.has_weight(exponent))) continue;
                const uint32_t at = atomicAdd(&memory.listed, 1u);
                if (at < static_cast<uint32_t>(capacity)) own[at] = place_of(scores[j], id + 32 * j);
            }
        });
    }
    __syncthreads();
    const int thread = fresh_thread(), lane = thread & 31, warp = thread >> 5;
    const uint32_t found = memory.listed;
    const int listed = min(static_cast<int>(found), capacity);
    if (warp == 0) team.tell(memory.lengths, {found, 0, 0, 0}, &it.memory.arrivals.few_lengths);
    if (rank != 0) {
        uint64_t* const arrival = &it.memory.arrivals.few_entries;
        for (int i = thread; i < listed; i += block_threads()) send(own + i, own[i], 0, arrival);
    }
    team.await(&it.memory.arrivals.few_lengths);
    const uint32_t told = lane < team.size ? memory.lengths[lane].x : 0;
    const uint32_t length = min(told, static_cast<uint32_t>(capacity));
    const int all = static_cast<int>(__reduce_add_sync(~0u, length));
    if (rank == 0 && team.size > 1) {
        if (thread == 0) expect_arrival(&it.memory.arrivals.few_entries, 8 * (all - listed));
        await_arrival(&it.memory.arrivals.few_entries);
    }
    if (all > kFewListed || __ballot_sync(~0u, told > static_cast<uint32_t>(capacity)) != 0) return -1;
    if (rank != 0) return all;

    const int slice_bits = warp_bits() - team.bits(), block = warp >> slice_bits;
    const int start = static_cast<int>(__reduce_add_sync(~0u, lane < block ? length : 0));
    const int end = start + static_cast<int>(__shfl_sync(~0u, length, block));
#pragma unroll 1
    for (int i = start + (thread & ((32 << slice_bits) - 1)); i < end; i += 32 << slice_bits) {
        const uint64_t place = memory.lists[block * capacity + i - start];
        memory.entries[i] = {place, row.softmax.weight(score_of_place(place))};
    }
    __syncthreads();
    return all;
}

// By the row's first block: writes the token, one of the listed ones.
__device__ __forceinline__ void draw_of_few(const Sampler& it, int count) {
    FewMemory& memory = it.memory.few;
    const auto [own, before, there] = compare_all(memory.entries, count);
    const Shared by = Shared::among(count);
    const auto top_k = static_cast<uint32_t>(it.choice().top_k);
    uint64_t wanted = ~uint64_t{0};
    if (it.choice().has_top_p != 0) {
        if (there && before.count + 1 == min(top_k, static_cast<uint32_t>(count)))  // the last that top-k keeps
            memory.wanted = it.choice().top_p_of(before.weight + own.weight);
        __syncthreads();
        wanted = memory.wanted;
    }
    const bool stays = before.count < top_k && before.weight < wanted && own.weight >= it.choice().least_weight;
    if (there) memory.weights[by.index] = stays ? own.weight : 0;
    __syncthreads();
    Tally lower = {}, total = {};  // of those kept: with lower ids, and of all
    if (by.index < count) {
        const int id = id_of_place(own.place);
#pragma unroll 4
        for (int i = by.first; i < count; i += by.lanes) {
            const uint64_t weight = memory.weights[i];
            total.weight += weight;
            if (id_of_place(memory.entries[i].place) < id) lower.weight += weight;
        }
    }
    __syncwarp();
#pragma unroll 1
    for (int lane = by.lanes / 2; lane > 0; lane /= 2) {
        lower = lower + shuffle_xor(lower, lane);
        total = total + shuffle_xor(total, lane);
    }
    if (!there || !stays) return;
    const uint64_t place = place_below(total.weight, it.memory.draw.random);
    if (lower.weight <= place && place - lower.weight < own.weight) it.write(DIJIANG_ROW_OK, id_of_place(own.place));
}

// Writes the row's token and is true, or there are more tokens than can be listed. best: this thread's best score.
__device__ __forceinline__ bool choose_of_few(const Sampler& it, const SelectedRow& row, float best) {
    FewMemory& memory = it.memory.few;
    if (threadIdx.x == 0) memory.row = row;
    bool any;
    {
        const float exponent = row.softmax.exponent(best), at = row.place_at(exponent);
        const bool weighs = row.softmax.has_weight(exponent);
        bound_few(it, at, weighs);
        any = weighs && at < memory.end;
    }
    const int count = list_few(it, row, any);
    if (count < 0) return false;
    if (it.team().rank() == 0) draw_of_few(it, count);
    return true;
}

}  // namespace dijiang
