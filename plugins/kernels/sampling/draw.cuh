// The random choice: the first id at which the running sum of weights exceeds a random place.
#pragma once

#include "sampling/philox.cuh"
#include "sampling/row.cuh"

namespace dijiang {

struct DrawMemory {
    uint64_t warps[kWarps], blocks[kMostTeam];
    uint64_t random;
};

// -1 in threads that did not find it; the others are of one warp and agree. All sum what their own ids weigh; the block
// with the place then sums the ids of the warp with the place, 32 at a time.
template <typename Weight>
__device__ int draw(const Team& team, const Part& part, DrawMemory& memory, uint64_t* arrival, Weight&& weight_of) {
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    int first = part.begin, last = part.end, share = part.per_warp;
    uint64_t place = 0;
#pragma unroll 1
    for (bool whole = true;; whole = false) {
        uint64_t sum = 0;
        const int from = first + warp * share;
        part.each<2>(from, min(from + share, last), [&](int id, float score) { sum += weight_of(id, score); });
        sum = warp_sum(sum);
        if (lane == 0) memory.warps[warp] = sum;
        __syncthreads();
        const uint64_t own = memory.warps[lane], running = warp_running(own);
        if (whole) {
            const uint64_t block = shuffle(running, 31);
            if (warp == 0) team.tell(memory.blocks, block, arrival);
            team.await(arrival);  // from here on blocks may leave
            const uint64_t blocks = warp_running(lane < team.size ? memory.blocks[lane] : 0);
            const uint64_t before = shuffle(blocks, team.rank) - block;
            place = place_below(shuffle(blocks, 31), memory.random);
            if (place < before || place - before >= block) return -1;
            place -= before;
        }
        const int owner = __ffs(static_cast<int>(__ballot_sync(~0u, running > place))) - 1;
        place -= shuffle(running - own, owner);
        first += owner * share;
        last = min(first + share, last);
        if (share == 32) break;
        share = 32 * ((share + kThreads - 1) / kThreads);
        __syncthreads();  // the sums are written again
    }
    int chosen = -1;
    part.each<1>(first, last, [&](int id, float score) {
        const uint64_t running = warp_running(weight_of(id, score));
        const uint32_t beyond = __ballot_sync(~0u, running > place);
        if (warp == 0 && lane == __ffs(static_cast<int>(beyond)) - 1) chosen = id;
    });
    return chosen;
}

}  // namespace dijiang
