// Products of the rows in shared memory with the weights that stream by, on tensor cores.
#pragma once

#include "step/ring.cuh"

namespace dijiang {
namespace step {

// Element (row, k) of rows that will be multiplied: [chunk][row][32].
template <int R> __device__ __forceinline__ int x_index(int row, int k) {
    return (k / kChunk * R + row) * kChunk + k % kChunk;
}

// This warp's part of x times the groups of rows of a matrix. The rows of x are
// those of A; with fewer than eight the first is there again, and its results are left. A warp's sum for one group is a
// piece; group + warp numbers pieces without a gap or a clash, since the warps' shares follow each other.
template <typename T, int R>
__device__ __forceinline__ void multiply(Cursor& at, const Cut& cut, const T* x, float* parts) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4;
    const int count = cut.count(warp), chunks = cut.chunks;
    int group = cut.first_group(warp), chunk = warp * cut.each - group * chunks;
    const uint4* mine = reinterpret_cast<const uint4*>(x + (row < R ? row : 0) * kChunk) + lane % 4;
    float c[4] = {}, d[4] = {};
#pragma unroll 2
    for (int i = 0; i < count; ++i) {
        const uint4 w = at.take(at.base + cut.place(i, warp)), v = mine[chunk * (R * kChunk / 8)];
        mma<T>(c, {v.x, 0u, v.y, 0u}, w.x, w.y);
        mma<T>(d, {v.z, 0u, v.w, 0u}, w.z, w.w);
        if (++chunk < chunks && i + 1 < count) continue;
        if (row < R)
            *reinterpret_cast<float2*>(parts + ((group + warp) * R + row) * kGroup + lane % 4 * 2) =
                make_float2(c[0] + d[0], c[1] + d[1]);
        c[0] = c[1] = c[2] = c[3] = d[0] = d[1] = d[2] = d[3] = 0.0f;
        chunk = 0;
        ++group;
    }
    at.finish(cut.units);
}

// The sum of all warps' pieces of an output, in their order.
template <int R>
__device__ __forceinline__ float gather(const Cut& cut, const float* parts, int group, int row, int output) {
    const int first = cut.first_warp(group), last = cut.last_warp(group);
    float sum = 0.0f;
    for (int w = first; w <= last; ++w) sum += parts[((group + w) * R + row) * kGroup + output];
    return sum;
}

}  // namespace step
}  // namespace dijiang
