// Where top-k and top-p cut a row: a histogram narrows the place down to few tokens, which are then compared.
#pragma once

#include "sampling/row.cuh"

namespace dijiang {

constexpr int kBinBits = 10;
constexpr int kBins = 1 << kBinBits;  // one of a thread
static_assert(kBins == kThreads);
constexpr int kListed = 256;  // tokens that are compared with each other
constexpr int kFilters = 2;   // top-k, top-p

// What all threads know alike of a row that tokens are selected from: in shared memory, since registers are scarce.
struct SelectedRow {
    Softmax softmax;
    uint64_t best;  // the highest place
    float per_bin;  // bins per unit of -exponent, equally wide in score

    __device__ int bin_at(float exponent) const { return min(kBins - 1, __float2int_rz(__fmul_rn(-exponent, per_bin))); }

    // The lowest key whose token would fall into bin `last` or a better one. All lanes search together.
    __device__ uint32_t lowest_key(int last) const {
        uint32_t low = kLowestKey, high = static_cast<uint32_t>(best >> 32);  // the answer is in [low, high]
#pragma unroll 1
        while (low < high) {
            const uint32_t span = high - low, step = span / 32 + 1, offset = (threadIdx.x % 32) * step;
            const bool good = offset >= span || bin_at(softmax.exponent(score_of(low + offset))) <= last;
            const uint32_t lanes = __ballot_sync(~0u, good);
            const uint32_t first = lanes == 0 ? 32u : static_cast<uint32_t>(__ffs(static_cast<int>(lanes)) - 1);
            if (first < 32 && first * step < span) high = low + first * step;
            if (first > 0) low += (first - 1) * step + 1;
            low = min(low, high);
        }
        return low;
    }
};

struct SelectMemory {
    uint32_t counts[kBins], low[kBins], high[kBins];  // this block's bins; weights in two halves
    Tally parts[kBins];    // all blocks' tallies of this block's share of the bins
    Tally running[kBins];  // of the whole row: of the bins up to each, of the 32 that a warp has
    uint64_t lists[kFilters][kMostTeam][kListed];  // of each block
    uint64_t lengths[kFilters][kMostTeam];
    uint64_t places[kListed], weights[kListed];  // all of them
    uint32_t listed[kFilters];                   // how many of this block's have a place
    SelectedRow row;
    Part part;               // for `narrow`
    Tally all;               // tokens that have weight
    Tally before, inside;    // what was found: the tally before it and of it
    int bin;
    uint64_t target;         // of a filter
    uint64_t place, kept;    // tokens from this place on are kept, and what they weigh together
    uint64_t low_place, high_place;
};

__device__ __forceinline__ void clear(SelectMemory& memory) {
    memory.counts[threadIdx.x] = memory.low[threadIdx.x] = memory.high[threadIdx.x] = 0;
}

__device__ __forceinline__ uint64_t amount(const Tally& tally, bool by_count) {
    return by_count ? uint64_t{tally.count} : tally.weight;
}

// Counts, or counts and weighs, the tokens that have weight: bin(exponent, score, id) says where; negative: nowhere.
template <bool kWeights, typename Bin>
__device__ __forceinline__ void histogram(const Part& part, const Softmax& softmax, SelectMemory& memory, Bin&& bin_of) {
    part.each([&](int id, float score) {
        const float exponent = softmax.exponent(score);
        if (!softmax.has_weight(exponent)) return;
        const int bin = bin_of(exponent, score, id);
        if (bin < 0) return;
        if (!kWeights) {
            atomicAdd(&memory.counts[bin], 1u);
            return;
        }
        const uint64_t weight = softmax.weight_at(exponent);
        const uint32_t low = static_cast<uint32_t>(weight);
        atomicAdd(&memory.counts[bin], 1u);
        const uint32_t carry = atomicAdd(&memory.low[bin], low) > ~low ? 1 : 0;
        const uint32_t high = static_cast<uint32_t>(weight >> 32) + carry;
        if (high != 0) atomicAdd(&memory.high[bin], high);
    });
}

__device__ __forceinline__ Tally tally_of(const SelectMemory& memory, int bin) {
    return {memory.counts[bin], 0, uint64_t{memory.high[bin]} << 32 | memory.low[bin]};
}

// memory.running of all blocks' bins. Each block adds up its share of them and tells all. Once as turn 0, once as 1.
__device__ __forceinline__ void add_up(const Team& team, Arrivals& arrivals, SelectMemory& memory, int turn) {
    const int thread = fresh_thread(), share_bits = kBinBits - team.bits(), share = 1 << share_bits;
    __syncthreads();
    const Tally own = tally_of(memory, thread);
    if (team.size == 1) {
        memory.running[thread] = warp_running(own);
        __syncthreads();
        return;
    }
    const int start = team.rank() << share_bits;
    send(reinterpret_cast<uint4*>(memory.parts + start + (thread & (share - 1))), own.words(), thread >> share_bits,
         &arrivals.parts[turn]);
    if (thread < share) {
        await_arrival(&arrivals.parts[turn]);
        Tally sum = {};
#pragma unroll
        for (int rank = 0; rank < kMostTeam; ++rank)
            if (rank < team.size) sum = sum + memory.parts[(rank << share_bits) + thread];
        const uint4 words = warp_running(sum).words();
        uint4* const to = reinterpret_cast<uint4*>(memory.running + start + thread);
#pragma unroll
        for (int rank = 0; rank < kMostTeam; ++rank)
            if (rank < team.size) send(to, words, rank, &arrivals.totals[turn]);
    }
    await_arrival(&arrivals.totals[turn]);
}

// The first bin up to which the target is reached, which some is; `start` lies before all bins.
__device__ __forceinline__ void reach(SelectMemory& memory, const Tally* running, const Tally& start, bool by_count) {
    const int thread = fresh_thread(), lane = thread % 32;
    Tally before = {};  // the warps before this one
    if (lane < thread / 32) before = running[32 * lane + 31];
    before = start + warp_sum(before);
    const Tally end = before + running[thread];
    if (lane > 0) before = before + running[thread - 1];
    if (amount(before, by_count) < memory.target && memory.target <= amount(end, by_count)) {
        memory.bin = thread;
        memory.before = before;
        memory.inside = end - before;
    }
    __syncthreads();
}

// A bin with more tokens than can be compared: bins of places, until one has few enough. Rare, and out of line; the
// first thread's part is in shared memory, lest it takes registers from the others. Leaves the range of places in
// memory.low_place and .high_place, and .before and .inside.
__device__ __noinline__ void narrow(SelectMemory& memory, int per_warp, int team_size, bool by_count) {
    const Team team{team_size};
    const Part part = memory.part.of_this_warp(per_warp);
    const SelectedRow row = memory.row;
    uint64_t low = uint64_t{row.lowest_key(memory.bin)} << 32;
    uint64_t high = memory.bin == 0 ? row.best : (uint64_t{row.lowest_key(memory.bin - 1)} << 32) - 1;
    Tally start = memory.before;
#pragma unroll 1
    while (memory.inside.count > kListed) {
        const int shift = max(0, 64 - __clzll(static_cast<long long>(high - low)) - kBinBits);
        __syncthreads();
        clear(memory);
        __syncthreads();
        histogram<true>(part, row.softmax, memory, [&](float, float score, int id) {
            const uint64_t place = place_of(score, id);
            return place >= low && place <= high ? static_cast<int>((high - place) >> shift) : -1;
        });
        team.sync();
        Tally sum = {};
#pragma unroll 1
        for (int rank = 0; rank < team.size; ++rank) sum = sum + tally_of(*team.of(&memory, rank), threadIdx.x);
        memory.parts[threadIdx.x] = warp_running(sum);  // the others' are not needed any more
        team.sync();                                    // and the bins may be filled anew
        reach(memory, memory.parts, start, by_count);
        start = memory.before;
        high -= static_cast<uint64_t>(memory.bin) << shift;
        const uint64_t width = uint64_t{1} << shift;
        if (high - low >= width) low = high - width + 1;
    }
    if (threadIdx.x == 0) memory.low_place = low, memory.high_place = high;
    __syncthreads();
}

// The places of all blocks that are chosen, memory.inside.count <= kListed of them, in no order: memory.places, and
// what they weigh.
template <typename Choose>
__device__ __forceinline__ void list_places(const Part& part, const Team& team, Arrivals& arrivals, SelectMemory& memory,
                                            int filter, Choose&& chosen) {
    uint64_t* const arrival = &arrivals.lists[filter];
    const Softmax softmax = memory.row.softmax;
    if (threadIdx.x == 0 && team.size > 1) expect_arrival(arrival, 8 * (memory.inside.count + team.size));
    part.each([&](int id, float score) {
        const float exponent = softmax.exponent(score);
        if (!softmax.has_weight(exponent) || !chosen(exponent, score, id)) return;
        uint64_t* const to = memory.lists[filter][team.rank()] + atomicAdd(&memory.listed[filter], 1u);
#pragma unroll 1
        for (int rank = 0; rank < team.size; ++rank) team.give(to, place_of(score, id), rank, arrival);
    });
    __syncthreads();
    if (threadIdx.x < 32) team.tell(memory.lengths[filter], uint64_t{memory.listed[filter]}, arrival);
    team.await(arrival);
    const int thread = fresh_thread();
    int at = thread;
    if (at < static_cast<int>(memory.inside.count)) {
        int rank = 0;
        for (; at >= static_cast<int>(memory.lengths[filter][rank]); ++rank) at -= memory.lengths[filter][rank];
        const uint64_t place = memory.lists[filter][rank][at];
        memory.places[thread] = place;
        memory.weights[thread] = memory.row.softmax.weight(score_of_place(place));
    }
    __syncthreads();
}

// Of those places, behind others that are better: the one that reaches the target becomes memory.place. Each is
// compared with all, by as many threads as there are for it.
__device__ __forceinline__ void cut_list(SelectMemory& memory, bool by_count) {
    const int thread = fresh_thread(), count = static_cast<int>(memory.inside.count);
    const int bits = min(__clz(max(count - 1, 1)) - 22, 5), each = 1 << bits, candidate = thread >> bits;  // 4 to 32 lanes
    const uint64_t place = candidate < count ? memory.places[candidate] : ~uint64_t{0};
    uint32_t better = 0;
    uint64_t weight = 0;
#pragma unroll 2
    for (int i = thread & (each - 1); i < count; i += each)
        if (memory.places[i] > place) ++better, weight += memory.weights[i];
#pragma unroll 1
    for (int by = each / 2; by > 0; by /= 2) {
        better += __shfl_xor_sync(~0u, better, by);
        weight += shuffle_xor(weight, by);
    }
    if (candidate < count && (thread & (each - 1)) == 0) {
        const Tally begin = memory.before + Tally{better, 0, weight}, end = begin + Tally{1, 0, memory.weights[candidate]};
        if (amount(begin, by_count) < memory.target && memory.target <= amount(end, by_count)) {
            memory.place = place;
            memory.kept = end.weight;
        }
    }
    __syncthreads();
}

}  // namespace dijiang
