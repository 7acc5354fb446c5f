// Where filters cut a row, nearly: the tokens that have weight are counted and weighed in bins of scores.
#pragma once

#include "sampling/row.cuh"

namespace dijiang {

constexpr int kBinBits = 10;
constexpr int kBins = 1 << kBinBits;
constexpr int kNowhere = kBins;  // and 31 more, one of each lane: bins for what has no weight
constexpr int kAllBins = kBins + 32;
constexpr int kListed = 512;         // tokens that are compared with each other
constexpr int kLists = 2 * kListed;  // places for them in the lists of a row's blocks

// Where bins begin, for SelectedRow::place_at; behind the last there is nothing.
__device__ __forceinline__ float beginning_of(int bin) { return bin < kBins ? static_cast<float>(bin) : INFINITY; }

__device__ __forceinline__ int padded(int bin) { return bin + (bin >> 5); }  // every 32nd in a bank of its own
constexpr int kPadded = kBins + kBins / 32;

// What all threads know alike of a row that tokens are selected from: in shared memory, since registers are scarce.
struct SelectedRow {
    Softmax softmax;
    uint64_t best;  // the highest place
    float per_bin;  // bins per unit of -exponent, equally wide in score

    // Where among the bins, which all are 1 wide but the last, which has no end.
    __device__ float place_at(float exponent) const { return __fmul_rn(-exponent, per_bin); }
    __device__ int bin_at(float exponent) const { return min(kBins - 1, __float2int_rz(place_at(exponent))); }

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

struct alignas(16) Entry {
    uint64_t place, weight;
};

// What the bins say of where a row is cut. Tokens in bins before `first` are better than any cut. Those of the bins
// first to first + span, and of bin `other` behind them, are listed; those elsewhere are not kept.
struct Bounds {
    int first, span, other;  // other: -1 if there is none
    bool by_count;           // top-k keeps not all of them
    Tally before, between;   // of the tokens before bin `first`; before bin `other` without those of `first` and on
};

struct SelectMemory {
    uint32_t counts[kAllBins], low[kAllBins], high[kAllBins];  // this block's bins; weights in two halves
    Tally parts[kPadded];    // all blocks' tallies of this block's share of the bins
    Tally running[kPadded];  // of the whole row: of the bins up to each, of the 32 that a warp has; padded
    Entry entries[kListed];  // the tokens that are listed, of all blocks in their order
    alignas(16) uint64_t lists[kLists];  // their places, as blocks send them: each has as many as there is room for
    uint32_t listed;         // this block's, also those that its list has no room for
    SelectedRow row;
    Bounds bounds;
    Part part;             // for `narrow`
    int bin;               // and where it begins
    Tally before;
    uint64_t target;
    uint64_t place, kept;  // tokens from this place on are kept, and what they weigh together
};

__device__ __forceinline__ void clear(SelectMemory& memory) {
    static_assert(offsetof(SelectMemory, parts) == 12 * kAllBins);
    if (threadIdx.x == 0) memory.listed = 0, memory.place = 0;
    uint4* const words = reinterpret_cast<uint4*>(&memory);
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < 12 * kAllBins / 16; i += block_threads()) words[i] = {0, 0, 0, 0};
}

__device__ __forceinline__ uint64_t amount(const Tally& tally, bool by_count) {
    return by_count ? uint64_t{tally.count} : tally.weight;
}

// More weight in some bins. Sums of 64 bits in two words, as there is no addition of 64 bits in shared memory; the
// second words wait for the first ones together. No branches: what is 0 goes into a bin of the lane's own.
template <int kCount>
__device__ __forceinline__ void add_weights(SelectMemory& memory, const int (&bins)[kCount],
                                            const uint64_t (&weights)[kCount]) {
    const int nowhere = kNowhere + fresh_lane();
    uint32_t before[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j)
        before[j] = atomicAdd(&memory.low[bins[j]], static_cast<uint32_t>(weights[j]));
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
        const uint32_t carry = before[j] > ~static_cast<uint32_t>(weights[j]) ? 1 : 0;
        const uint32_t high = static_cast<uint32_t>(weights[j] >> 32) + carry;
        atomicAdd(&memory.high[high != 0 ? bins[j] : nowhere], high);
    }
}

__device__ __forceinline__ Tally tally_of(const SelectMemory& memory, int bin) {
    return {memory.counts[bin], 0, uint64_t{memory.high[bin]} << 32 | memory.low[bin]};
}

// memory.running of all blocks' bins. Each block adds up its share of them and tells all. meanwhile(): what the last
// thread has to do besides.
template <typename Meanwhile>
__device__ __forceinline__ void add_up(const Team& team, Arrivals& arrivals, SelectMemory& memory,
                                       Meanwhile&& meanwhile) {
    const int thread = fresh_thread();
    __syncthreads();
    if (team.size == 1) {
#pragma unroll 1
        for (int bin = thread; bin < kBins; bin += block_threads())
            memory.running[padded(bin)] = warp_running(tally_of(memory, bin));
        if (thread == block_threads() - 1) meanwhile();
        __syncthreads();
        return;
    }
    const int share_bits = kBinBits - team.bits(), share = 1 << share_bits, start = team.rank() << share_bits;
#pragma unroll 1
    for (int bin = thread; bin < kBins; bin += block_threads())
        send(reinterpret_cast<uint4*>(memory.parts + start + (bin & (share - 1))), tally_of(memory, bin).words(),
             bin >> share_bits, &arrivals.parts);
    if (thread < share) {
        await_arrival(&arrivals.parts);
        Tally sum = {};
#pragma unroll 4
        for (int rank = 0; rank < team.size; ++rank) sum = sum + memory.parts[(rank << share_bits) + thread];
        const uint4 words = warp_running(sum).words();
        uint4* const to = reinterpret_cast<uint4*>(memory.running + padded(start + thread));
#pragma unroll 4
        for (int rank = 0; rank < team.size; ++rank) send(to, words, rank, &arrivals.totals);
    }
    if (thread == block_threads() - 1) meanwhile();
    await_arrival(&arrivals.totals);
}

// A bin, and the tallies of what comes before it and of that with it.
struct Cut {
    int bin;
    Tally before, end;
};

// The bins of a row, `start` before them, as each warp looks at them: without waiting for others.
struct Bins {
    const Tally* running;
    Tally before, all;  // what comes before the 32 bins that this lane stands for; everything

    static __device__ Bins of(const Tally* running, const Tally& start) {
        const Tally own = running[padded(32 * fresh_lane() + 31)], end = start + warp_running(own);
        return {running, end - own, shuffle(end, 31)};
    }
    // The first bin up to which the target is reached, which is 1 or more and not more than there is.
    __device__ Cut find(uint64_t target, bool by_count) const {
        const int group = 31 - __clz(static_cast<int>(__ballot_sync(~0u, amount(before, by_count) < target)));
        const Tally base = shuffle(before, group);
        const Tally end = base + running[padded(32 * group + fresh_lane())];
        const int at = __popc(__ballot_sync(~0u, amount(end, by_count) < target));
        const Tally previous = shuffle(end, max(at - 1, 0));
        return {32 * group + at, at == 0 ? base : previous, shuffle(end, at)};
    }
};

// Finds where memory.target is reached in bin memory.bin, before which memory.before lies, however many tokens are in
// it: bins of places, until one has a single token. Rare, and out of line; the first thread's part is in shared memory,
// lest it takes registers from the others. Leaves memory.place and .kept.
__device__ __noinline__ void narrow(SelectMemory& memory, int per_warp, int team_size, bool by_count) {
    const Team team{team_size};
    const Part part = memory.part.of_this_warp(per_warp);
    const SelectedRow row = memory.row;
    uint64_t low = uint64_t{row.lowest_key(memory.bin)} << 32;
    uint64_t high = memory.bin == 0 ? row.best : (uint64_t{row.lowest_key(memory.bin - 1)} << 32) - 1;
    Cut cut = {0, memory.before, {}};
#pragma unroll 1
    do {
        const int shift = max(0, 64 - __clzll(static_cast<long long>(high - low)) - kBinBits);
        __syncthreads();
        clear(memory);
        __syncthreads();
        part.each_one([&](int id, const float (&score)[1]) {
            const uint64_t place = place_of(score[0], id);
            const float exponent = row.softmax.exponent(score[0]);
            if (!row.softmax.has_weight(exponent) || place < low || place > high) return;
            const int bins[1] = {static_cast<int>((high - place) >> shift)};
            const uint64_t weights[1] = {row.softmax.weight_at(exponent)};
            atomicAdd(&memory.counts[bins[0]], 1u);
            add_weights(memory, bins, weights);
        });
        team.sync();
#pragma unroll 1
        for (int bin = static_cast<int>(threadIdx.x); bin < kBins; bin += block_threads()) {
            Tally sum = {};
#pragma unroll 1
            for (int rank = 0; rank < team.size; ++rank) sum = sum + tally_of(*team.of(&memory, rank), bin);
            memory.parts[padded(bin)] = warp_running(sum);  // the others' are not needed any more
        }
        team.sync();  // and the bins may be filled anew
        cut = Bins::of(memory.parts, cut.before).find(memory.target, by_count);
        high -= static_cast<uint64_t>(cut.bin) << shift;
        const uint64_t width = uint64_t{1} << shift;
        if (high - low >= width) low = high - width + 1;
    } while (cut.end.count - cut.before.count > 1);
    __syncthreads();
    if (threadIdx.x == 0) memory.place = low, memory.kept = cut.end.weight;
    __syncthreads();
}

}  // namespace dijiang
