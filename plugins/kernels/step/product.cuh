// Products of the rows in shared memory with the weights that stream by, on tensor cores.
#pragma once

#include "step/ring.cuh"

namespace dijiang {
namespace step {

// Element (row, k) of rows that will be multiplied: [chunk][row][32].
template <int R> __device__ __forceinline__ uint32_t x_index(uint32_t row, uint32_t k) {
    return R == 1 ? k : (k / kChunk * R + row) * kChunk + k % kChunk;
}

// This warp's units of some groups of rows, times x. Weights are A of an mma, so that lane (g, t) gets output g of rows 2t and
// 2t + 1. A has place for sixteen outputs: with up to four rows the second eight are the same outputs over the other half of
// a chunk's columns, with that half of x in columns 4 to 7 of B.
template <typename T, int R> struct Multiplier {
    static constexpr bool kHalves = R <= 4;
    Cursor& at;
    const int warp, lane;
    uint4 w[kPerSlot];
    float c[4], d[4];

    __device__ __forceinline__ explicit Multiplier(Cursor& cursor)
        : at(cursor), warp(threadIdx.x / 32), lane(threadIdx.x % 32) {}

    // Reads the next slot's units: before x is waited for.
    __device__ __forceinline__ void fetch() {
        at.arrive();
#pragma unroll
        for (int i = 0; i < kPerSlot; ++i) w[i] = at.read(i);
    }
    // All of a batch: so many units, of groups of `chunks`. Each warp leaves a sum for each output, in its part of `sums`.
    __device__ __forceinline__ void run(const T* x, int chunks, int units, float* sums) {
        const int row = kHalves ? lane / 4 % R : lane / 4;  // beyond the rows others again, whose results are left
        const T* const mine = x + row * kChunk + lane % 4 * 8 + (kHalves && lane >= 16 ? 4 : 0);
        int chunk = warp, group = 0;
        skip_groups(chunk, group, chunks);
        clear();
#pragma unroll 1
        for (int left = units - warp; left > -warp; left -= kSlotUnits) {
            if (left > kSlotUnits - kWarps && chunk + (kSlotUnits - kWarps) < chunks) {
#pragma unroll
                for (int i = 0; i < kPerSlot; ++i)
                    multiply(i % 2 ? d : c, w[i], mine + (chunk + i * kWarps) * (R * kChunk));
                chunk += kSlotUnits;
                if (chunk >= chunks) {
                    leave_sum(sums, group);
                    skip_groups(chunk, group, chunks);
                }
            } else {
#pragma unroll 1
                for (int i = 0; i < kPerSlot && i * kWarps < left; ++i) {
                    multiply(c, at.read(i), mine + chunk * (R * kChunk));
                    chunk += kWarps;
                    if (chunk < chunks) continue;
                    leave_sum(sums, group);
                    skip_groups(chunk, group, chunks);
                }
            }
            at.leave();
            if (left > kSlotUnits - warp) fetch();
        }
    }

private:
    __device__ __forceinline__ void clear() { c[0] = c[1] = c[2] = c[3] = d[0] = d[1] = d[2] = d[3] = 0.0f; }
    static __device__ __forceinline__ void skip_groups(int& chunk, int& group, int chunks) {
#pragma unroll 1
        for (; chunk >= chunks; chunk -= chunks) ++group;
    }
    __device__ __forceinline__ void multiply(float (&sum)[4], const uint4& unit, const T* from) {
        if (kHalves) {
            const uint2 v = *reinterpret_cast<const uint2*>(from);
            mma<T>(sum, {unit.x, unit.y, unit.z, unit.w}, v.x, v.y);
        } else {
            const uint4 v = *reinterpret_cast<const uint4*>(from);
            mma<T>(sum, {unit.x, 0u, unit.z, 0u}, v.x, v.y);
            mma<T>(sum, {unit.y, 0u, unit.w, 0u}, v.z, v.w);
        }
    }
    __device__ __forceinline__ void leave_sum(float* sums, int group) {
        const int row = lane % 4 * 2, output = lane / 4;
        float one = c[0] + d[0], other = c[1] + d[1];
        if (kHalves) {
            if (lane % 4 >= 2) one = c[2] + d[2], other = c[3] + d[3];
            one += __shfl_xor_sync(~0u, one, 2);
            if (R > 1) other += __shfl_xor_sync(~0u, other, 2);
        }
        float* const to = sums + (group * R + row) * kGroup + output;
        if (row < R) to[0] = one;
        if (row + 1 < R) to[kGroup] = other;
        clear();
    }
};

}  // namespace step
}  // namespace dijiang
