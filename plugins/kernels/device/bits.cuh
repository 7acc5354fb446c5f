// Bits of 32-bit words, and pairs of 16-bit floats made of them.
#pragma once

#include "device/elements.cuh"

namespace dijiang {

// a & b | c and so on, as one instruction.
template <int kTable> __device__ __forceinline__ uint32_t logic(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(kTable));
    return d;
}
constexpr int kAndOr = (0xf0 & 0xcc) | 0xaa, kAndXor = (0xf0 & 0xcc) ^ 0xaa;

// x y + z of pairs. All that is computed with it here is exact.
template <typename T> __device__ __forceinline__ uint32_t fused(uint32_t x, uint32_t y, uint32_t z);
template <> __device__ __forceinline__ uint32_t fused<__half>(uint32_t x, uint32_t y, uint32_t z) {
    uint32_t d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(x), "r"(y), "r"(z));
    return d;
}
template <> __device__ __forceinline__ uint32_t fused<__nv_bfloat16>(uint32_t x, uint32_t y, uint32_t z) {
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(x), "r"(y), "r"(z));
    return d;
}

}  // namespace dijiang
