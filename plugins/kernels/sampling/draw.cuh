// The random choice: the first id at which the running sum of weights exceeds a random place.
#pragma once

#include "sampling/philox.cuh"
#include "sampling/row.cuh"

namespace dijiang {

struct DrawMemory {
    uint64_t warps[kWarps], blocks[kMostTeam];
    uint64_t random;
};

// -1 in threads that did not find it; the others are of one warp and agree. All sum what their own ids weigh; the warp
// with the place then looks for it, 32 ids at a time.
template <typename Weight>
__device__ int draw(const Team& team, const Part& part, DrawMemory& memory, uint64_t* arrival, Weight&& weight_of) {
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    uint64_t sum = 0;
    part.each([&](int id, float score) { sum += weight_of(id, score); });
    sum = warp_sum(sum);
    if (lane == 0) memory.warps[warp] = sum;
    __syncthreads();
    const uint64_t own = memory.warps[lane], running = warp_running(own), block = shuffle(running, 31);
    if (warp == 0) team.tell(memory.blocks, block, arrival);
    team.await(arrival);  // from here on blocks may leave
    const uint64_t blocks = warp_running(lane < team.size ? memory.blocks[lane] : 0);
    const uint64_t before = shuffle(blocks, team.rank()) - block;
    uint64_t place = place_below(shuffle(blocks, 31), memory.random);
    if (place < before || place - before >= block) return -1;
    place -= before;
    const int owner = __ffs(static_cast<int>(__ballot_sync(~0u, running > place))) - 1;
    place -= shuffle(running - own, owner);
    if (warp != owner) return -1;
    int chosen = -1;
    part.each([&](int id, float score) {
        if (chosen >= 0) return;  // of all lanes alike
        const uint64_t weight = weight_of(id, score), chunk = warp_sum(weight);
        if (place >= chunk) {
            place -= chunk;
            return;
        }
        const uint32_t beyond = __ballot_sync(~0u, warp_running(weight) > place);
        chosen = id - lane + __ffs(static_cast<int>(beyond)) - 1;
    });
    return lane == 0 ? chosen : -1;
}

}  // namespace dijiang
