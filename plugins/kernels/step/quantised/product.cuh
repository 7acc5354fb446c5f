// Products of the rows in shared memory with int8 and int4 weights that stream by, on tensor cores.
//
// As step/product.cuh has it, with a unit's integers made 16-bit floats in registers, exactly. The sums of a block of 32
// columns are float32, and scaled when they are added to the others: never is a weight rounded.
#pragma once

#include "device/widen.cuh"
#include "step/product.cuh"

namespace dijiang {
namespace step {

// A lane's part of a unit.
struct QuantisedUnit {
    uint4 weights[kLoads];
    uint32_t scales[kMostBlocks / 2];  // of its row; int8 has the first half
    uint32_t slot;
};

template <typename T, int R> class QuantisedMultiplier {
public:
    __device__ __forceinline__ QuantisedMultiplier(Cursor& cursor, int chunks_of_x)
        : at(cursor), warp(threadIdx.x / 32), lane(threadIdx.x % 32), chunks(chunks_of_x) {}

    // So many groups come next; bit i of `int8` says of which format group i is. Reads the first round's units, before x is
    // waited for.
    __device__ __forceinline__ void begin(int groups, uint32_t int8, QuantisedUnit& first) {
        left = groups;
        eights = int8;
        fetch_first(first);
    }
    // Those groups. Each warp leaves a sum for each output, in its part of `sums`.
    __device__ __forceinline__ void run(QuantisedUnit first, const T* x, float* sums) {
        const int row = kHalves ? lane / 4 % R : lane / 4;  // beyond the rows others again, whose results are left
        x += row * kChunk + lane % 4 * 8 + (kHalves && lane >= 16 ? 4 : 0);
#pragma unroll 1
        for (;;) {  // groups of one format that follow each other
            const bool eight = eights & 1u;
            const int groups = same_groups(eight);
            if (eight) run_groups<DIJIANG_INT8>(first, x, sums, groups);
            else run_groups<DIJIANG_INT4>(first, x, sums, groups);
            left -= groups;
            if (left == 0) break;
            sums += groups * (R * kGroup);
            eights >>= groups;
            fetch_first(first);
        }
    }

private:
    static constexpr bool kHalves = R <= 4;
    Cursor& at;
    const int warp, lane, chunks;
    int left;         // groups
    uint32_t eights;  // which of them are int8

    __device__ __forceinline__ void fetch_first(QuantisedUnit& to) {
        const bool eight = eights & 1u;
        const int groups = same_groups(eight);
        if (eight) fetch<DIJIANG_INT8>(to, groups * units_of_group(chunks, true));
        else fetch<DIJIANG_INT4>(to, groups * units_of_group(chunks, false));
    }
    // Groups of the first one's format that follow each other.
    __device__ __forceinline__ int same_groups(bool eight) const {
        const int others = __ffs(static_cast<int>(eight ? ~eights : eights)) - 1;
        return others < 0 ? left : min(others, left);
    }
    // Waits for a round, and reads this warp's unit of it, if there is one: so many are left.
    template <int kFormat> __device__ __forceinline__ void fetch(QuantisedUnit& to, int units) {
        constexpr bool kEight = kFormat == DIJIANG_INT8;
        constexpr int kScales = (kEight ? kMostBlocks / 2 : kMostBlocks) * 2;  // bytes of a row's
        at.template arrive<1>(at.slot, at.parity);
        to.slot = at.slot;
        if (warp < units) {
            const uint8_t* const unit = at.bytes + warp * unit_bytes(kEight) + at.slot * kRoundBytes;
#pragma unroll
            for (int i = 0; i < kLoads; ++i) to.weights[i] = *reinterpret_cast<const uint4*>(unit + i * 512 + lane * 16);
            const uint8_t* const scales = unit + kLoads * 512 + lane / 4 * kScales;
#pragma unroll
            for (int i = 0; i < kScales; i += 8) {
                const uint2 some = *reinterpret_cast<const uint2*>(scales + i);
                to.scales[i / 4] = some.x;
                to.scales[i / 4 + 1] = some.y;
            }
        }
        at.next();
    }
    // Groups of one format: warp w takes units w, w + 8, .. of all of them. A round is multiplied
    // and left before the next is waited for: so there are registers enough for what attention asks for.
    template <int kFormat>
    __device__ __forceinline__ void run_groups(QuantisedUnit present, const T* x, float* to, int groups) {
        const int each = units_of_group(chunks, kFormat == DIJIANG_INT8);
        int left = groups * each, unit = warp;
        if (each < kWarps) {  // then some warps have nothing of some groups
#pragma unroll 1
            for (int i = lane; i < groups * R * kGroup; i += 32) to[i] = 0.0f;
            __syncwarp();
        }
        to += lane / 4;
#pragma unroll 1
        for (; unit >= each; unit -= each) to += R * kGroup;
        float sum[4] = {};
#pragma unroll 1
        for (;;) {
            const bool mine = warp < left;
            left -= kWarps;
            if (mine) multiply<kFormat>(sum, present, unit, x);
            at.leave(present.slot);
            if (left > 0) fetch<kFormat>(present, left);
            if (mine) {
                unit += kWarps;
                if (unit >= each) {
                    leave_sum(sum, to);
#pragma unroll 1
                    for (; unit >= each; unit -= each) to += R * kGroup;
                }
            }
            if (left <= 0) break;
        }
    }
    template <int kFormat>
    __device__ __forceinline__ void multiply(float (&sum)[4], const QuantisedUnit& it, int unit, const T* x) const {
        constexpr int kBlocks = kFormat == DIJIANG_INT4 ? kMostBlocks : kMostBlocks / 2;
        const int chunk = max(min(unit * kBlocks, chunks - kBlocks), 0);  // the last unit ends with the columns
        const T* const from = x + chunk * (R * kChunk);
        uint32_t words[4 * kLoads];
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            words[4 * i] = it.weights[i].x;
            words[4 * i + 1] = it.weights[i].y;
            words[4 * i + 2] = it.weights[i].z;
            words[4 * i + 3] = it.weights[i].w;
        }
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
            uint32_t w[4];
            if constexpr (kFormat == DIJIANG_INT4) widen4<T>(words[b], w);
            else widen8<T>(words[2 * b], words[2 * b + 1], w);
            float c[4] = {};
            if (kHalves) {
                const uint2 v = *reinterpret_cast<const uint2*>(from + b * (R * kChunk));
                mma<T>(c, {w[0], w[2], w[1], w[3]}, v.x, v.y);
            } else {
                const uint4 v = *reinterpret_cast<const uint4*>(from + b * (R * kChunk));
                mma<T>(c, {w[0], 0u, w[1], 0u}, v.x, v.y);
                mma<T>(c, {w[2], 0u, w[3], 0u}, v.z, v.w);
            }
            const float2 both = unpack<__half>(it.scales[b / 2]);
            const float scale = b % 2 ? both.y : both.x;
            sum[0] = fmaf(scale, c[0], sum[0]);
            if (R > 1) sum[1] = fmaf(scale, c[1], sum[1]);
            if (kHalves) sum[2] = fmaf(scale, c[2], sum[2]);
            if (kHalves && R > 1) sum[3] = fmaf(scale, c[3], sum[3]);
        }
    }
    __device__ __forceinline__ void leave_sum(float (&sum)[4], float* to) const {
        const int row = lane % 4 * 2;
        float one = sum[0], other = sum[1];
        if (kHalves) {
            if (lane % 4 >= 2) one = sum[2], other = sum[3];
            one += __shfl_xor_sync(~0u, one, 2);
            if (R > 1) other += __shfl_xor_sync(~0u, other, 2);
        }
        if (row < R) to[row * kGroup] = one;
        if (row + 1 < R) to[(row + 1) * kGroup] = other;
        sum[0] = sum[1] = sum[2] = sum[3] = 0.0f;
    }
};

}  // namespace step
}  // namespace dijiang
