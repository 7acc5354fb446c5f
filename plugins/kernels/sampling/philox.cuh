// The random number of (seed, stream, draw): Philox4x64-10 as NumPy has it.
// Multipliers, key increments and the counter that is raised before its first use:
// numpy/numpy@24cbf64cb34df66f9e9e07c5549d9af5cc2ff36d:numpy/random/src/philox/philox.h:20-21,80-91,187-203
#pragma once

#include <cstdint>

namespace dijiang {

// The first 64 bits of the block with key (seed, stream) and counter (draw + 1, carry, 0, 0).
__device__ __forceinline__ uint64_t philox_first(uint64_t seed, uint64_t stream, uint64_t draw) {
    uint64_t counter[4] = {draw + 1, draw + 1 == 0 ? 1ull : 0ull, 0, 0}, key[2] = {seed, stream};
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        constexpr uint64_t kFirst = 0xD2E7470EE14C6C93ull, kSecond = 0xCA5A826395121157ull;
        const uint64_t high0 = __umul64hi(kFirst, counter[0]), low0 = kFirst * counter[0];
        const uint64_t high1 = __umul64hi(kSecond, counter[2]), low1 = kSecond * counter[2];
        counter[0] = high1 ^ counter[1] ^ key[0];
        counter[2] = high0 ^ counter[3] ^ key[1];
        counter[1] = low1;
        counter[3] = low0;
        key[0] += 0x9E3779B97F4A7C15ull;
        key[1] += 0xBB67AE8584CAA73Bull;
    }
    return counter[0];
}

struct RandomNumber {
    uint64_t seed, stream, draw;

    __device__ uint64_t bits() const { return philox_first(seed, stream, draw); }
};

// floor(u * total) for u in [0, 1) made of the number's upper 53 bits: exact.
__device__ __forceinline__ uint64_t place_below(uint64_t total, uint64_t random) {
    return __umul64hi(random & ~uint64_t{0x7FF}, total);
}

}  // namespace dijiang
