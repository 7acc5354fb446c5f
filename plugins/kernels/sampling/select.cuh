// Where top-k and top-p cut a row: histograms narrow the place down to few tokens, which are then sorted.
#pragma once

#include "sampling/row.cuh"

namespace dijiang {

constexpr int kBins = 2 * kThreads;
constexpr int kListed = kThreads;

struct SelectMemory {
    uint32_t counts[kBins], low[kBins], high[kBins];  // weights in two halves
    union {
        struct {
            uint64_t list[kListed], sorted[kListed];
        };
        Tally sums[kThreads];  // of all blocks, for this block's share of the bins
    };
    uint32_t listed;
    Tally scratch[kWarps];
    Tally before, inside;  // what was found: the tally before it and of it
    uint64_t found;
};

// Tokens from place `first` on are kept; `weight` is what they weigh together.
struct Cut {
    uint64_t first, weight;
};

struct Selector {
    const Team& team;
    const Part& part;
    const Softmax& softmax;
    SelectMemory& memory;
    uint64_t best;    // the row's highest place
    float per_bin;    // bins per unit of -exponent
    Tally coarse[2];  // bins 2t and 2t + 1 of the whole row, equally wide in score
    uint64_t total;   // what the row weighs

    // `least`: the row's lowest finite score.
    __device__ Selector(const Team& team_, const Part& part_, const Softmax& softmax_, SelectMemory& memory_,
                        uint64_t best_, float least)
        : team(team_), part(part_), softmax(softmax_), memory(memory_), best(best_) {
        const float range = fminf(-softmax.exponent(least), static_cast<float>(softmax.shift + 1));
        per_bin = range > 0 ? fminf(kBins / range, FLT_MAX) : 0.0f;
        histogram([&](float score, int, bool& inside) {
            inside = true;
            return bin_of(score);
        });
        add_up(coarse[0], coarse[1]);
        const Tally running = block_running(coarse[0] + coarse[1], memory.scratch);
        if (threadIdx.x == kThreads - 1) memory.found = running.weight;
        __syncthreads();
        total = memory.found;
        __syncthreads();
    }

    __device__ int bin_of(float score) const {
        return min(kBins - 1, __float2int_rz(__fmul_rn(-softmax.exponent(score), per_bin)));
    }

    // The tallies of bins 2t and 2t + 1 over all blocks. Each block adds up its share of the bins, which all
    // then read: shared memory of other blocks is far away.
    __device__ void add_up(Tally& first, Tally& second) {
        const int bin = 2 * static_cast<int>(threadIdx.x);
        if (team.size == 1) {
            first = tally_of(memory, bin);
            second = tally_of(memory, bin + 1);
        } else {
            const int share = kBins / team.size;
            if (static_cast<int>(threadIdx.x) < share) {
                Tally sum = {0, 0};
#pragma unroll 2
                for (int rank = 0; rank < team.size; ++rank)
                    sum = sum + tally_of(*team.of(&memory, rank), team.rank * share + threadIdx.x);
                memory.sums[threadIdx.x] = sum;
            }
            team.sync();
            const Tally* const sums = team.of(memory.sums, bin / share) + bin % share;
            first = sums[0];
            second = sums[1];
        }
        team.sync();  // nobody reads the histograms and sums any more
    }

    __device__ static Tally tally_of(const SelectMemory& memory, int bin) {
        return {memory.counts[bin], uint64_t{memory.high[bin]} << 32 | memory.low[bin]};
    }

    // Counts and weighs the tokens that have weight, by bin; bin(score, id, inside) says which, and whether
    // it counts.
    template <typename Bin>
    __device__ void histogram(Bin&& bin_at) {
        for (int bin = threadIdx.x; bin < kBins; bin += kThreads)
            memory.counts[bin] = memory.low[bin] = memory.high[bin] = 0;
        __syncthreads();
        part.each([&](int id, float score) {
            const uint64_t weight = softmax.weight(score);
            bool inside = false;
            int bin = weight > 0 ? bin_at(score, id, inside) : 0;
            const uint32_t lanes = __ballot_sync(~0u, inside);
            if (lanes == 0) return;
            const int leader = __ffs(static_cast<int>(lanes)) - 1;
            const int leading = __shfl_sync(~0u, bin, leader);
            const uint64_t leading_weight = __shfl_sync(~0u, weight, leader);
            if (__all_sync(~0u, !inside || (bin == leading && weight == leading_weight))) {
                // Equal scores would all queue for one counter: one lane adds for all.
                const uint32_t count = static_cast<uint32_t>(__popc(lanes));
                if (static_cast<int>(threadIdx.x % 32) == leader) add(bin, count, count * weight);
            } else if (inside) {
                add(bin, 1, weight);
            }
        });
        team.sync();
    }

    __device__ void add(int bin, uint32_t count, uint64_t weight) {
        const uint32_t low = static_cast<uint32_t>(weight);
        atomicAdd(&memory.counts[bin], count);
        const uint32_t carry = atomicAdd(&memory.low[bin], low) > ~low ? 1 : 0;
        const uint32_t high = static_cast<uint32_t>(weight >> 32) + carry;
        if (high != 0) atomicAdd(&memory.high[bin], high);
    }

    // Looks for the first item whose running tally reaches the target, given two neighbouring items of each
    // thread. All threads get its index (or -1), and memory.before and .inside. `start` is added to every
    // tally.
    __device__ int reach(const Tally& first, const Tally& second, const Tally& start, uint64_t target,
                         bool by_count) {
        if (threadIdx.x == 0) memory.found = ~uint64_t{0};
        const Tally end = start + block_running(first + second, memory.scratch);  // with a barrier inside
        const Tally middle = {end.count - second.count, end.weight - second.weight};
        const Tally begin = {middle.count - first.count, middle.weight - first.weight};
        const auto amount = [=](const Tally& tally) {
            return by_count ? uint64_t{tally.count} : tally.weight;
        };
        if (amount(begin) < target && target <= amount(end)) {
            const bool in_first = target <= amount(middle);
            memory.found = 2 * threadIdx.x + (in_first ? 0 : 1);
            memory.before = in_first ? begin : middle;
            memory.inside = in_first ? first : second;
        }
        __syncthreads();
        const int found = static_cast<int>(memory.found);
        __syncthreads();  // before the next search writes there
        return found;
    }

    // The lowest key whose token would fall into bin `last` or a better one. All lanes search together.
    __device__ uint32_t lowest_key(int last) const {
        uint32_t low = kLowestKey, high = static_cast<uint32_t>(best >> 32);  // the answer is in [low, high]
#pragma unroll 1
        while (low < high) {
            const uint32_t span = high - low, step = span / 32 + 1, offset = (threadIdx.x % 32) * step;
            const bool good = offset >= span || bin_of(score_of(low + offset)) <= last;
            const uint32_t lanes = __ballot_sync(~0u, good);
            const uint32_t first =
                lanes == 0 ? 32u : static_cast<uint32_t>(__ffs(static_cast<int>(lanes)) - 1);
            if (first < 32 && first * step < span) high = low + first * step;
            if (first > 0) low += (first - 1) * step + 1;
            low = min(low, high);
        }
        return low;
    }

    // The places in [low, high] of all blocks, best first, one per thread; 0 behind the last. At most
    // kListed.
    __device__ uint64_t sorted_window(uint64_t low, uint64_t high) {
        if (threadIdx.x == 0) memory.listed = 0;
        __syncthreads();
        part.each([&](int id, float score) {
            const uint64_t place = place_of(score, id);
            if (place < low || place > high || softmax.weight(score) == 0) return;
            memory.list[atomicAdd(&memory.listed, 1u)] = place;
        });
        team.sync();
        uint64_t mine = 0;
        uint32_t before = 0;
#pragma unroll 1
        for (int rank = 0; rank < team.size; ++rank) {
            const SelectMemory& other = *team.of(&memory, rank);
            const uint32_t index = threadIdx.x - before;  // huge if another block's
            if (threadIdx.x >= before && index < other.listed) mine = other.list[index];
            before += other.listed;
        }
        team.sync();  // the lists may be filled anew
        return sort(mine, static_cast<int>(before));
    }

    // Bitonic, descending. Only the first `count` threads have something; the others bring 0.
    __device__ uint64_t sort(uint64_t mine, int count) {
        const int thread = static_cast<int>(threadIdx.x);
        int padded = 32;  // to whole warps and a power of two
        while (padded < count) padded *= 2;
        const bool active = thread < padded;
#pragma unroll 1
        for (int size = 2; size <= padded; size *= 2) {
#pragma unroll 1
            for (int apart = size / 2; apart > 0; apart /= 2) {
                uint64_t other = 0;
                if (apart >= 32) {
                    if (active) memory.sorted[thread] = mine;
                    __syncthreads();
                    if (active) other = memory.sorted[thread ^ apart];
                    __syncthreads();
                } else if (active) {
                    other = __shfl_xor_sync(~0u, mine, apart);
                }
                const bool descending = (thread & size) == 0, lower = (thread & apart) == 0;
                if (active) mine = descending == lower ? max(mine, other) : min(mine, other);
            }
        }
        return mine;
    }

    // Keeps the best tokens until their number, or their weight, reaches `target` >= 1; all if that is not to
    // be reached.
    __device__ Cut select(uint64_t target, bool by_count) {
        int bin = reach(coarse[0], coarse[1], {0, 0}, target, by_count);
        if (bin < 0) return {0, 0};
        Tally before = memory.before, inside = memory.inside;
        uint64_t high = bin == 0 ? best : (uint64_t{lowest_key(bin - 1)} << 32) - 1;
        uint64_t low = uint64_t{lowest_key(bin)} << 32;
#pragma unroll 1
        while (inside.count > kListed) {
            const int bits = 64 - __clzll(static_cast<long long>(high - low));
            const int shift = max(0, bits - 11);
            histogram([&](float score, int id, bool& counts) {
                const uint64_t place = place_of(score, id);
                counts = place >= low && place <= high;
                return counts ? static_cast<int>((high - place) >> shift) : 0;
            });
            Tally first, second;
            add_up(first, second);
            bin = reach(first, second, before, target, by_count);
            before = memory.before;
            inside = memory.inside;
            high -= static_cast<uint64_t>(bin) << shift;
            const uint64_t width = uint64_t{1} << shift;
            low = high - low >= width ? high - width + 1 : low;
        }
        const uint64_t place = sorted_window(low, high);
        const Tally one = place == 0 ? Tally{0, 0} : Tally{1, softmax.weight(score_of(place >> 32))};
        const Tally running = before + block_running(one, memory.scratch);
        const uint64_t amount = by_count ? running.count : running.weight;
        const uint64_t previous = by_count ? running.count - one.count : running.weight - one.weight;
        if (previous < target && target <= amount) {
            memory.found = place;
            memory.before = running;
        }
        __syncthreads();
        const Cut cut = {memory.found, memory.before.weight};
        __syncthreads();
        return cut;
    }
};

}  // namespace dijiang
