#pragma once
#include "device/elements.cuh"
namespace dijiang {
template <int kTable> uint32_t logic(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d = 0;
    for (int i = 0; i < 32; ++i) {
        const uint32_t row = (a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1);
        d |= static_cast<uint32_t>(kTable >> row & 1) << i;
    }
    return d;
}
constexpr int kAndOr = (0xf0 & 0xcc) | 0xaa, kAndXor = (0xf0 & 0xcc) ^ 0xaa;
template <typename T> uint32_t fused(uint32_t x, uint32_t y, uint32_t z) {
    const float2 a = unpack<T>(x), b = unpack<T>(y), c = unpack<T>(z);
    return pack<T>(std::fma(a.x, b.x, c.x), std::fma(a.y, b.y, c.y));
}
}  // namespace dijiang
