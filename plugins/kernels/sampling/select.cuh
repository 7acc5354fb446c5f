// Where top-k and top-p cut a row: a histogram narrows the place down to few tokens, which are then sorted.
#pragma once

#include "sampling/row.cuh"

namespace dijiang {

constexpr int kBinBits = 10;
constexpr int kBins = 1 << kBinBits;  // one of a thread
static_assert(kBins == kThreads);
constexpr int kListed = 512;       // tokens that are compared with each other
constexpr int kFilters = 2;        // top-k, top-p

// A row that tokens are selected from. What all threads know alike is in shared memory, and read there where it is
// needed: registers are scarce.
struct SelectedRow {
    Team team;
    Arrivals* arrivals;
    const Part* part;
    Softmax softmax;
    uint64_t best;  // the highest place
    float per_bin;  // bins per unit of -exponent, equally wide in score
};

struct SelectMemory {
    uint32_t counts[kBins], low[kBins], high[kBins];  // this block's bins; weights in two halves
    Tally parts[kBins];    // all blocks' tallies of this block's share of the bins
    Tally totals[kBins];   // of the whole row
    Tally running[kBins];  // of its tokens up to each bin, of the first histogram
    uint64_t lists[kFilters][kListed], weights[kListed];
    uint32_t listed[kFilters];  // how many of them have a place; the first block's count
    Tally scratch[kWarps];
    Tally before, inside;         // what was found: the tally before it and of it
    int bin;
    uint64_t target;                // of a filter
    uint64_t place, kept;           // tokens from this place on are kept, and what they weigh together
    uint64_t low_place, high_place;
    SelectedRow selected;           // for `narrow`
};

__device__ __forceinline__ void clear(SelectMemory& memory) {
    memory.counts[threadIdx.x] = memory.low[threadIdx.x] = memory.high[threadIdx.x] = 0;
}

__device__ __forceinline__ Tally tally_of(const SelectMemory& memory, int bin) {
    return {memory.counts[bin], 0, uint64_t{memory.high[bin]} << 32 | memory.low[bin]};
}

__device__ __forceinline__ uint64_t amount(const Tally& tally, bool by_count) {
    return by_count ? uint64_t{tally.count} : tally.weight;
}

// Of a thread's own tally: `running` becomes that of all threads up to it.
__device__ __forceinline__ void accumulate(Tally* running, const Tally& start, const Tally& own, Tally* scratch) {
    running[threadIdx.x] = start + block_running(own, scratch);
    __syncthreads();
}

// The first bin up to which the target is reached, which some is.
__device__ __forceinline__ void reach(SelectMemory& memory, const Tally* running, const Tally& start,
                                      bool by_count) {
    const Tally end = running[threadIdx.x], begin = threadIdx.x == 0 ? start : running[threadIdx.x - 1];
    if (amount(begin, by_count) < memory.target && memory.target <= amount(end, by_count)) {
        memory.bin = static_cast<int>(threadIdx.x);
        memory.before = begin;
        memory.inside = end - begin;
    }
    __syncthreads();
}

struct Selection : SelectedRow {
    explicit __device__ Selection(const SelectedRow& row) : SelectedRow(row) {}
    // `least`: the lowest finite score.
    __device__ Selection(const Team& team_, Arrivals& arrivals_, const Part& part_, const Softmax& softmax_,
                         uint64_t best_, float least)
        : SelectedRow{team_, &arrivals_, &part_, softmax_, best_, 0.0f} {
        const float range = fminf(-softmax.exponent(least), -softmax.least_exponent);
        if (range > 0) per_bin = fminf(kBins / range, FLT_MAX);
    }

    __device__ int bin_at(float exponent) const { return min(kBins - 1, __float2int_rz(__fmul_rn(-exponent, per_bin))); }

    // The tally of this thread's bin over all blocks. Each block adds up its share of the bins and tells all. Once.
    __device__ Tally add_up(SelectMemory& memory) const {
        const int share = kBins >> team.bits(), thread = static_cast<int>(threadIdx.x), block = thread >> (kBinBits - team.bits());
        __syncthreads();
        const Tally own = tally_of(memory, thread);
        if (team.size == 1) return own;
        send(reinterpret_cast<uint4*>(memory.parts + team.rank() * share + (thread & (share - 1))), own.words(), block,
             &arrivals->parts);
        if (thread < share) {
            await_arrival(&arrivals->parts);
            Tally sum = {};
#pragma unroll
            for (int rank = 0; rank < kMostTeam; ++rank)
                if (rank < team.size) sum = sum + memory.parts[rank * share + thread];
            uint4* const to = reinterpret_cast<uint4*>(memory.totals + team.rank() * share + thread);
#pragma unroll
            for (int rank = 0; rank < kMostTeam; ++rank)
                if (rank < team.size) send(to, sum.words(), rank, &arrivals->totals);
        }
        await_arrival(&arrivals->totals);
        return memory.totals[thread];
    }

    // The same as often as it is needed.
    __device__ Tally add_up_again(SelectMemory& memory) const {
        team.sync();
        Tally sum = {};
#pragma unroll 1
        for (int rank = 0; rank < team.size; ++rank)
            sum = sum + tally_of(*team.of(&memory, rank), static_cast<int>(threadIdx.x));
        team.sync();  // the bins may be filled anew
        return sum;
    }

    // Counts and weighs the tokens that have weight: bin(exponent, place) says where; negative: nowhere.
    template <typename Bin> __device__ void histogram(SelectMemory& memory, Bin&& bin_of) const {
        part->each([&](int id, float score) {
            const float exponent = softmax.exponent(score);
            if (!softmax.has_weight(exponent)) return;
            const int bin = bin_of(exponent, place_of(score, id));
            if (bin < 0) return;
            const uint64_t weight = softmax.weight_at(exponent);
            const uint32_t low = static_cast<uint32_t>(weight);
            atomicAdd(&memory.counts[bin], 1u);
            const uint32_t carry = atomicAdd(&memory.low[bin], low) > ~low ? 1 : 0;
            const uint32_t high = static_cast<uint32_t>(weight >> 32) + carry;
            if (high != 0) atomicAdd(&memory.high[bin], high);
        });
    }

    // The lowest key whose token would fall into bin `last` or a better one. All lanes search together.
    __device__ uint32_t lowest_key(int last) const {
        uint32_t low = kLowestKey, high = static_cast<uint32_t>(best >> 32);  // the answer is in [low, high]
#pragma unroll 1
        while (low < high) {
            const uint32_t span = high - low, step = span / 32 + 1, offset = (threadIdx.x % 32) * step;
            const bool good = offset >= span || bin_at(softmax.exponent(score_of(low + offset))) <= last;
            const uint32_t lanes = __ballot_sync(~0u, good);
            const uint32_t first =
                lanes == 0 ? 32u : static_cast<uint32_t>(__ffs(static_cast<int>(lanes)) - 1);
            if (first < 32 && first * step < span) high = low + first * step;
            if (first > 0) low += (first - 1) * step + 1;
            low = min(low, high);
        }
        return low;
    }

    // The places of all blocks that are chosen, memory.inside.count <= kListed of them, in no order: memory.lists[filter].
    template <typename Choose> __device__ void list_places(SelectMemory& memory, int filter, Choose&& chosen) const {
        uint64_t* const list = memory.lists[filter];
        uint64_t* const arrival = &arrivals->lists[filter];
        uint32_t* const listed = team.of(&memory.listed[filter], 0);
        if (threadIdx.x == 0 && team.size > 1) expect_arrival(arrival, 8 * memory.inside.count);
        part->each([&](int id, float score) {
            const float exponent = softmax.exponent(score);
            if (!softmax.has_weight(exponent)) return;
            const uint64_t place = place_of(score, id);
            if (!chosen(exponent, place)) return;
            uint64_t* const to = list + atomicAdd(listed, 1u);
#pragma unroll 1
            for (int rank = 0; rank < team.size; ++rank) team.give(to, place, rank, arrival);
        });
        team.await(arrival);
    }
};

// A bin with more tokens than can be sorted: bins of places, until one has few enough. Rare: out of line, and what it
// needs is handed over in shared memory, so that it takes no registers from the others. Leaves the range of places in
// memory.low_place and .high_place, and .before.
__device__ __noinline__ void narrow(SelectMemory& memory, bool by_count) {
    const Selection it(memory.selected);
    uint64_t low = uint64_t{it.lowest_key(memory.bin)} << 32;
    uint64_t high = memory.bin == 0 ? it.best : (uint64_t{it.lowest_key(memory.bin - 1)} << 32) - 1;
    Tally before = memory.before;
#pragma unroll 1
    while (memory.inside.count > kListed) {
        const int shift = max(0, 64 - __clzll(static_cast<long long>(high - low)) - 10);
        __syncthreads();
        clear(memory);
        __syncthreads();
        it.histogram(memory, [&](float, uint64_t place) {
            return place >= low && place <= high ? static_cast<int>((high - place) >> shift) : -1;
        });
        accumulate(memory.totals, before, it.add_up_again(memory), memory.scratch);
        reach(memory, memory.totals, before, by_count);
        before = memory.before;
        high -= static_cast<uint64_t>(memory.bin) << shift;
        const uint64_t width = uint64_t{1} << shift;
        if (high - low >= width) low = high - width + 1;
    }
    if (threadIdx.x == 0) memory.low_place = low, memory.high_place = high;
    __syncthreads();
}

// Of memory.inside.count places, behind others that are better: the one that reaches the target becomes memory.place.
// Each is compared with all, by as many threads as there are for it.
__device__ __forceinline__ void cut_list(SelectMemory& memory, const uint64_t* list, bool by_count) {
    const int thread = static_cast<int>(threadIdx.x), count = static_cast<int>(memory.inside.count);
    if (thread < count) memory.weights[thread] = memory.selected.softmax.weight(score_of(static_cast<uint32_t>(list[thread] >> 32)));
    const int bits = min(__clz(max(count - 1, 1)) - 22, 5), each = 1 << bits, candidate = thread >> bits;  // 2 to 32 lanes
    __syncthreads();
    const uint64_t place = candidate < count ? list[candidate] : ~uint64_t{0};
    uint32_t better = 0;
    uint64_t weight = 0;
#pragma unroll 2
    for (int i = thread & (each - 1); i < count; i += each)
        if (list[i] > place) ++better, weight += memory.weights[i];
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

// Keeps the best tokens until their number, or their weight, reaches `target` >= 1; all if that is not to be reached.
// At most once for each filter, 0 first; the second keeps no more than the first.
__device__ __forceinline__ void select(SelectMemory& memory, int filter, bool by_count) {
    if (amount(memory.running[kBins - 1], by_count) < memory.target) {
        __syncthreads();  // the next filter has another target
        return;
    }
    reach(memory, memory.running, {}, by_count);
    const bool many = memory.inside.count > kListed;
    if (many) narrow(memory, by_count);
    const int bin = memory.bin;
    const Selection it(memory.selected);
    it.list_places(memory, filter, [&](float exponent, uint64_t place) {
        return many ? place >= memory.low_place && place <= memory.high_place : it.bin_at(exponent) == bin;
    });
    cut_list(memory, memory.lists[filter], by_count);
}

}  // namespace dijiang
