// Products of the rows in shared memory with the weights that stream by, on tensor cores.
#pragma once

#include "step/ring.cuh"

namespace dijiang {
namespace step {

template <int R> constexpr int kSumsOfWarp = kBatch * R * kGroup;  // floats

// Element (row, k) of rows that will be multiplied: [chunk][row][32].
template <int R> __device__ __forceinline__ uint32_t x_index(uint32_t row, uint32_t k) {
    return R == 1 ? k : (k / kChunk * R + row) * kChunk + k % kChunk;
}

// This warp's units of some groups of rows, times x. Weights are A of an mma, so that lane (g, t) gets output g of rows 2t and
// 2t + 1. A has place for sixteen outputs: with up to four rows the second eight are the same outputs over the other half of
// a chunk's columns, with that half of x in columns 4 to 7 of B.
struct Units {
    uint4 of[kPerSlot];  // that a warp takes of a slot
};
template <typename T, int R> struct Multiplier {
    static constexpr bool kHalves = R <= 4;
    Cursor& at;
    const int warp, lane;
    float c[4], d[4];

    __device__ __forceinline__ explicit Multiplier(Cursor& cursor)
        : at(cursor), warp(threadIdx.x / 32), lane(threadIdx.x % 32) {}

    // Reads the first slot's units: before x is waited for.
    __device__ __forceinline__ void fetch(Units& first) { fetch(first, at.slot, at.parity); }

    // All of a batch: so many units, of groups of `chunks`. Each warp leaves a sum for each output, in its part of `sums`.
    __device__ __forceinline__ void run(Units present, const T* x, int chunks, int units, float* sums) {
        const int row = kHalves ? lane / 4 % R : lane / 4;  // beyond the rows others again, whose results are left
        State it{x + row * kChunk + lane % 4 * 8 + (kHalves && lane >= 16 ? 4 : 0), sums + lane / 4, chunks, units - warp, warp};
        skip_groups(it);
        clear();
#pragma unroll 1
        for (Units next; slot(it, present, next); present = next) {}
    }

private:
    struct State {
        const T* x;
        float* sums;   // of this lane's output of the present group
        int chunks;
        int left;      // units from this warp's first of the present slot on
        int chunk;     // of that
    };
    __device__ __forceinline__ void fetch(Units& units, uint32_t slot, uint32_t parity) {
        at.arrive(slot, parity);
#pragma unroll
        for (int i = 0; i < kPerSlot; ++i) units.of[i] = at.read(slot, i);
    }
    // Multiplies a slot's units, which were read, then reads the next slot's: what was multiplied is there when those are.
    // False behind the last.
    __device__ __forceinline__ bool slot(State& it, const Units& units, Units& next) {
        const bool whole = it.left > kSlotUnits - kWarps && it.chunk + (kSlotUnits - kWarps) < it.chunks;
        if (whole) {
            const T* const from = it.x + it.chunk * (R * kChunk);
#pragma unroll
            for (int i = 0; i < kPerSlot; ++i) multiply(i % 2 ? d : c, units.of[i], from + i * kWarps * (R * kChunk));
            it.chunk += kSlotUnits;
        } else {
#pragma unroll 1
            for (int i = 0; i < kPerSlot && i * kWarps < it.left; ++i) {
                multiply(c, at.read(at.slot, i), it.x + it.chunk * (R * kChunk));
                it.chunk += kWarps;
                if (it.chunk >= it.chunks) leave_sum(it);
            }
        }
        at.leave();
        const bool more = it.left > kSlotUnits - warp;
        if (more) fetch(next, at.slot, at.parity);
        if (whole && it.chunk >= it.chunks) leave_sum(it);
        it.left -= kSlotUnits;
        return more;
    }
    static __device__ __forceinline__ void skip_groups(State& it) {
#pragma unroll 1
        for (; it.chunk >= it.chunks; it.chunk -= it.chunks) it.sums += R * kGroup;
    }
    __device__ __forceinline__ void leave_sum(State& it) {
        const int row = lane % 4 * 2;
        float one = c[0] + d[0], other = c[1] + d[1];
        if (kHalves) {
            if (lane % 4 >= 2) one = c[2] + d[2], other = c[3] + d[3];
            one += __shfl_xor_sync(~0u, one, 2);
            if (R > 1) other += __shfl_xor_sync(~0u, other, 2);
        }
        if (row < R) it.sums[row * kGroup] = one;
        if (row + 1 < R) it.sums[(row + 1) * kGroup] = other;
        clear();
        skip_groups(it);
    }
    __device__ __forceinline__ void clear() { c[0] = c[1] = c[2] = c[3] = d[0] = d[1] = d[2] = d[3] = 0.0f; }
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
};

}  // namespace step
}  // namespace dijiang
