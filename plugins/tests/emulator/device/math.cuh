#pragma once
#include "cuda_on_cpu.h"
namespace dijiang {
constexpr float kLog2E = 1.4426950408889634f;
inline float fast_exp2(float x) { return std::exp2(x); }
inline float max_or_nan(float x, float y) { return x != x ? x : y != y || y > x ? y : x; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float reciprocal(float x) { return 1.0f / x; }
inline float fast_rsqrt(float x) { return 1.0f / std::sqrt(x); }
inline float fast_silu(float x) { return x / (1.0f + std::exp(-x)); }
inline float silu(float x) { return x / (1.0f + std::exp(-x)); }
inline float warp_sum(float x) {
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
    return x;
}
}  // namespace dijiang
