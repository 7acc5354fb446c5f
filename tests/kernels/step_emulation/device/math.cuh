// plugins/kernels/device/math.cuh in C++.
#pragma once

#include "emulator.h"

namespace dijiang {

constexpr float kLog2E = 1.4426950408889634f;

inline float fast_exp2(float x) { return std::exp2(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float silu(float x) { return x / (1.0f + std::exp(-x)); }
inline float warp_sum(float x) {
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
    return x;
}
inline float warp_max(float x) {
    for (int offset = 16; offset > 0; offset /= 2) x = std::fmax(x, __shfl_xor_sync(~0u, x, offset));
    return x;
}

}  // namespace dijiang
