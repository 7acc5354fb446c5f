// What an MLP has between its products (dijiang_activation).
#pragma once

#include "device/math.cuh"
#include "dijiang/linear.h"

namespace dijiang {

__device__ __forceinline__ float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678f)); }
__device__ __forceinline__ float gelu_tanh(float x) {
    return 0.5f * x * (1.0f + tanhf(0.79788456f * fmaf(0.044715f * x, x * x, x)));  // sqrt(2 / pi)
}

__device__ __forceinline__ float activate(int activation, float x, float second) {
    switch (activation) {
        case DIJIANG_RELU: return x < 0.0f ? 0.0f : x;  // NaN stays NaN
        case DIJIANG_GELU: return gelu(x);
        case DIJIANG_GELU_TANH: return gelu_tanh(x);
        case DIJIANG_SILU: return silu(x);
        case DIJIANG_SWIGLU: return silu(x) * second;
        default: return x;
    }
}

}  // namespace dijiang
