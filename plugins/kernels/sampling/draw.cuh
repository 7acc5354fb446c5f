// The random choice: the first id at which the running sum of weights exceeds a random place.
#pragma once

#include "sampling/philox.cuh"
#include "sampling/row.cuh"

namespace dijiang {

struct DrawMemory {
    uint64_t warps[kWarps], blocks[kMostTeam];
    uint64_t random;
};

// -1 in threads that did not find it; one has. All sum what their own ids weigh; the warp with the place then looks for
// it, 32 ids at a time.
template <typename Weight>
__device__ __forceinline__ int draw(const Team& team, const Part& part, DrawMemory& memory, uint64_t* arrival,
                                    Weight&& weight_of) {
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    uint64_t sum = 0;
    part.each([&](int id, float score) { sum += weight_of(id, score); });
    sum = warp_sum(sum);
    if (lane == 0) memory.warps[warp] = sum;
    __syncthreads();
    const uint64_t own = memory.warps[lane], block = warp_sum(own);
    if (warp == 0) team.tell(memory.blocks, block, arrival);
    team.await(arrival);  // from here on blocks may leave
    const uint64_t other = lane < team.size ? memory.blocks[lane] : 0;
    const uint64_t before = warp_sum(lane < team.rank() ? other : 0);
    uint64_t place = place_below(warp_sum(other), memory.random);
    if (place < before || place - before >= block) return -1;
    place -= before;
    const uint64_t earlier = warp_sum(lane < warp ? own : 0), mine = shuffle(own, warp);
    if (place < earlier || place - earlier >= mine) return -1;
    place -= earlier;
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
