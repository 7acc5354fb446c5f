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
    uint4 weights;
    uint2 scales;  // of its row; int8 has the first half
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
        sums += lane / 4;
#pragma unroll 1
        for (;;) {  // groups of one format that follow each other
            const bool eight = eights & 1u;
            const int others = __ffs(static_cast<int>(eight ? ~eights : eights)) - 1;
            const int groups = others < 0 ? left : min(others, left);
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
        if (eights & 1u) fetch<DIJIANG_INT8>(to, 0);
        else fetch<DIJIANG_INT4>(to, 0);
    }
    // Waits for a round, and reads this warp's unit of it, if there is one. `first`: the round's first unit of its group.
    template <int kFormat> __device__ __forceinline__ void fetch(QuantisedUnit& to, int first) {
        constexpr bool kEight = kFormat == DIJIANG_INT8;
        at.template arrive<1>(at.slot, at.parity);
        to.slot = at.slot;
        if (first + warp < units_of_group(chunks, kEight)) {
            const uint8_t* const unit = at.bytes + warp * unit_bytes(kEight) + at.slot * kRoundBytes;
            to.weights = *reinterpret_cast<const uint4*>(unit + lane * 16);
            if (kEight) to.scales.x = *reinterpret_cast<const uint32_t*>(unit + 512 + lane / 4 * 4);
            else to.scales = *reinterpret_cast<const uint2*>(unit + 512 + lane / 4 * 8);
        }
        at.next();
    }
    // Groups of one format. A round is read before the one ahead of it is multiplied: it is mostly there.
    template <int kFormat>
    __device__ __forceinline__ void run_groups(QuantisedUnit present, const T* x, float* to, int groups) {
        const int units = units_of_group(chunks, kFormat == DIJIANG_INT8);
        float sum[4] = {};
        int first = 0;
#pragma unroll 1
        for (;;) {
            const int unit = first + warp;
            first += kWarps;
            const bool ends = first >= units;
            if (ends) first = 0, --groups;
            QuantisedUnit next;
            if (groups > 0) fetch<kFormat>(next, first);
            if (unit < units) multiply<kFormat>(sum, present, unit, x);
            at.leave(present.slot);
            if (ends) {
                leave_sum(sum, to);
                to += R * kGroup;
            }
            if (groups == 0) break;
            present = next;
        }
    }
    template <int kFormat> __device__ __forceinline__ void multiply(float (&sum)[4], const QuantisedUnit& it, int unit, const T* x) const {
        constexpr int kBlocks = kFormat == DIJIANG_INT4 ? 4 : 2;
        const int chunk = max(min(unit * kBlocks, chunks - kBlocks), 0);  // the last unit ends with the columns
        const T* const from = x + chunk * (R * kChunk);
        const uint32_t words[4] = {it.weights.x, it.weights.y, it.weights.z, it.weights.w};
        const uint32_t scales[2] = {it.scales.x, it.scales.y};
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
            uint32_t w[4];
            if constexpr (kBlocks == 4) widen4<T>(words[b], w);
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
            const float2 both = unpack<__half>(scales[b / 2]);
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
