// The random choice: the first id at which the running sum of weights exceeds a random place.
#pragma once

#include "sampling/philox.cuh"
#include "sampling/row.cuh"

namespace dijiang {

struct DrawMemory {
    uint64_t warps[kMostWarps];    // what the ids of each of this block's warps weigh
    uint64_t shares[kMostWarps];   // and blocks' listed tokens, in parts
    uint64_t finally[kMostWarps];  // and of each warp with those listed
    uint4 sums[kMostTeam];     // what the ids of each block weigh, in two words, and how many it has listed
    uint64_t random;
};

__device__ __forceinline__ uint64_t weight_of(const uint4& sum) { return uint64_t{sum.y} << 32 | sum.x; }

// Tells all blocks what this one's ids weigh, `mine` of each lane, and how many it has listed: in sums, for those who
// have awaited that. What the block's threads have written they all see then.
__device__ __forceinline__ void tell_sums(const Team& team, DrawMemory& memory, uint4* sums, uint64_t* arrival,
                                          uint64_t mine, const uint32_t& listed) {
    const int thread = fresh_thread(), lane = thread & 31;
    const uint64_t sum = warp_sum(mine);
    if (lane == 0) memory.warps[thread >> 5] = sum;
    __syncthreads();
    if (thread >= 32) return;
    const uint64_t block = warp_sum(lane < block_warps() ? memory.warps[lane] : 0);
    const uint4 words = {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), listed, 0};
    team.tell(sums, words, arrival);
}

// Where a place among all is within those of `mine`; false if it is elsewhere. Each lane has weight of some index; they
// are in the indices' order.
__device__ __forceinline__ bool lies_in(uint64_t weight, int index, int mine, uint64_t& place) {
    const uint64_t before = warp_sum(index < mine ? weight : 0), own = warp_sum(index == mine ? weight : 0);
    if (place < before || place - before >= own) return false;
    place -= before;
    return true;
}

// Which of the weights of this block's warps a place lies in, which it then is a place within.
__device__ __forceinline__ int index_at(const uint64_t* weights, uint64_t& place) {
    const int lane = fresh_lane();
    const uint64_t weight = lane < block_warps() ? weights[lane] : 0, end = warp_running(weight);
    const int index = __popc(__ballot_sync(~0u, end <= place));
    place -= shuffle(end - weight, index);
    return index;
}

// The id at a place within this warp's weight, by all its lanes: 32 ids at a time, several times at once where scores
// are at hand.
template <int kAtOnce, typename Weight>
__device__ __forceinline__ int id_among(const Part& part, uint64_t place, Weight&& weight_of) {
    const int first = part.first + static_cast<int>(threadIdx.x % 32);
#pragma unroll 1
    for (int i = 0; i < part.count; i += kAtOnce) {
        uint64_t weights[kAtOnce], sums[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
            const float score = part.count - i > j ? part.score(i + j) : -INFINITY;
            weights[j] = weight_of(first + 32 * (i + j), score);
        }
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) sums[j] = warp_sum(weights[j]);
        int found = -1;
        uint64_t weight = 0;
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
            if (found >= 0) continue;
            if (place >= sums[j]) {
                place -= sums[j];
            } else {
                found = i + j;
                weight = weights[j];
            }
        }
        if (found < 0) continue;
        const uint32_t beyond = __ballot_sync(~0u, warp_running(weight) > place);
        return part.first + 32 * found + __ffs(static_cast<int>(beyond)) - 1;
    }
    return -1;  // never: the place is less than the sum of all
}
template <typename Weight>
__device__ __forceinline__ int id_at(const Part& part, uint64_t place, Weight&& weight_of) {
    if (part.kept == 0) return id_among<1>(part, place, weight_of);
    return id_among<4>(part, place, weight_of);
}

}  // namespace dijiang
