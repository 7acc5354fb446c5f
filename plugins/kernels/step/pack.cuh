// Canonical tensors to their places in the packed weights. Runs once per model, so it is simple rather than fast.
#pragma once

#include "device/elements.cuh"
#include "step/step.h"

namespace dijiang {
namespace step {

struct Two {
    const void* of[2];
};

// A thread for 16 bytes: row `lane / 4` of a unit, columns 8 (lane % 4) on. Elements are moved, whatever their type.
__global__ void pack_matrix(Layout it, int layer, int matrix, Two from, uint8_t* packed) {
    const int64_t chunks = it.chunks(matrix), total = int64_t{it.groups(matrix)} * chunks * 32;
    const int64_t step = int64_t{gridDim.x} * blockDim.x;
    for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < total; i += step) {
        const int lane = static_cast<int>(i % 32), chunk = static_cast<int>(i / 32 % chunks);
        const int group = static_cast<int>(i / 32 / chunks);
        const Source source = source_of(it, matrix, group * kGroup + lane / 4);
        uint4 v = make_uint4(0, 0, 0, 0);
        if (source.tensor >= 0)
            v = static_cast<const uint4*>(from.of[source.tensor])[(source.row * chunks + chunk) * 4 + lane % 4];
        reinterpret_cast<uint4*>(packed)[unit_of(it, layer, matrix, group, chunk) * 32 + lane] = make_uint4(v.x, v.z, v.y, v.w);
    }
}

// Biases in the order of the packed rows. Where there is none, zeros.
__global__ void pack_bias(Layout it, int matrix, const float* first, const float* second, float* to) {
    const int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= it.groups(matrix) * kGroup) return;
    const Source source = source_of(it, matrix, row);
    const float* from = source.tensor == 0 ? first : second;
    to[row] = from == nullptr ? 0.0f : from[source.row];
}

// P^T in units: row f of a unit's eight is feature f.
template <typename T> __global__ void pack_proj(int d, const float* proj, T* to) {
    const int chunks = (d + kChunk - 1) / kChunk, i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= d * chunks * kChunk) return;
    const int unit = i / (kGroup * kChunk), within = i % (kGroup * kChunk);
    const int feature = unit / chunks * kGroup + within / kChunk, k = unit % chunks * kChunk + within % kChunk;
    to[i] = from_float<T>(k < d ? proj[int64_t{k} * d + feature] : 0.0f);
}

__global__ void copy_floats(const float* from, int64_t count, float* to) {
    const int64_t step = int64_t{gridDim.x} * blockDim.x;
    for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) to[i] = from[i];
}

// A norm's weight and bias of each element. Where there is no bias, zeros.
__global__ void pack_norm(const float* weight, const float* bias, int64_t count, float2* to) {
    const int64_t step = int64_t{gridDim.x} * blockDim.x;
    for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step)
        to[i] = make_float2(weight[i], bias == nullptr ? 0.0f : bias[i]);
}

}  // namespace step
}  // namespace dijiang
