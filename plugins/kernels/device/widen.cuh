// Quantised weights as 16-bit floats: exact, whatever the bits are. dijiang_linear and dijiang_step have them in registers.
#pragma once

#include "device/bits.cuh"

namespace dijiang {

// Eight int4 of a block: bits 4 p and 16 + 4 p have pair p. An integer below a 16-bit float's
// significand, with the exponent that makes its last bit 1, is that integer and a constant.
template <typename T> __device__ __forceinline__ void widen4(uint32_t q, uint32_t (&pairs)[4]);
template <> __device__ __forceinline__ void widen4<__half>(uint32_t q, uint32_t (&pairs)[4]) {
    constexpr uint32_t k1024 = 0x64006400, kOne = 0x3c003c00, kSixteenth = 0x2c002c00;
    constexpr uint32_t kLow = 0xe408e408, kHigh = 0xd480d480;  // -1032 and -72
    const uint32_t up = q >> 8;
    pairs[0] = fused<__half>(logic<kAndOr>(q, 0x000f000f, k1024), kOne, kLow);
    pairs[1] = fused<__half>(logic<kAndOr>(q, 0x00f000f0, k1024), kSixteenth, kHigh);
    pairs[2] = fused<__half>(logic<kAndOr>(up, 0x000f000f, k1024), kOne, kLow);
    pairs[3] = fused<__half>(logic<kAndOr>(up, 0x00f000f0, k1024), kSixteenth, kHigh);
}
template <> __device__ __forceinline__ void widen4<__nv_bfloat16>(uint32_t q, uint32_t (&pairs)[4]) {
    constexpr uint32_t k128 = 0x43004300, kOne = 0x3f803f80, kLess = 0xc308c308;  // -136
#pragma unroll
    for (int p = 0; p < 4; ++p)
        pairs[p] = fused<__nv_bfloat16>(logic<kAndOr>(q >> (4 * p), 0x000f000f, k128), kOne, kLess);
}

// Eight int8 of a block, in order.
template <typename T> __device__ __forceinline__ void widen8(uint32_t low, uint32_t high, uint32_t (&pairs)[4]);
template <> __device__ __forceinline__ void widen8<__half>(uint32_t low, uint32_t high, uint32_t (&pairs)[4]) {
    constexpr uint32_t k1024 = 0x64646464, kOne = 0x3c003c00, kLess = 0xe480e480;  // -1152
    pairs[0] = fused<__half>(__byte_perm(low, k1024, 0x4140), kOne, kLess);
    pairs[1] = fused<__half>(__byte_perm(low, k1024, 0x4342), kOne, kLess);
    pairs[2] = fused<__half>(__byte_perm(high, k1024, 0x4140), kOne, kLess);
    pairs[3] = fused<__half>(__byte_perm(high, k1024, 0x4342), kOne, kLess);
}
// A bfloat16 has seven bits of an integer; the eighth decides what is subtracted: 128 where it is set, or 256.
template <>
__device__ __forceinline__ void widen8<__nv_bfloat16>(uint32_t low, uint32_t high, uint32_t (&pairs)[4]) {
    constexpr uint32_t k128 = 0x43004300, kOne = 0x3f803f80, kMinus256 = 0xc380c380;
    const uint32_t bytes[4] = {__byte_perm(low, 0, 0x4140), __byte_perm(low, 0, 0x4342),
                               __byte_perm(high, 0, 0x4140), __byte_perm(high, 0, 0x4342)};
#pragma unroll
    for (int p = 0; p < 4; ++p)
        pairs[p] = fused<__nv_bfloat16>(logic<kAndOr>(bytes[p], 0x007f007f, k128), kOne,
                                        logic<kAndXor>(bytes[p], 0x00800080, kMinus256));
}

}  // namespace dijiang
