// Products of the rows in shared memory with int8 and int4 weights that stream by, on tensor cores.
//
// As step/product.cuh has it, with a unit's integers made 16-bit floats in registers, exactly. The sums of a block of 32
// columns are float32, and scaled when they are added to the others: never is a weight rounded.
#pragma once

#include "step/context.cuh"
#include "step/quantised/integers.cuh"

namespace dijiang {
namespace step {

// A lane's part of a unit. Two blocks of 32 columns are multiplied at a time: of up to four rows, lanes 0, 1 of each four get
// the even ones' sums and 2, 3 the odd ones', so that they need the scales of these alone.
template <int R> struct QuantisedUnit {
    uint4 weights[kLoads];
    uint32_t scales[kMostBlocks / (R <= 4 ? 4 : 2)];  // of its row: the even blocks', the odd ones'; int8 has half as many
    const uint8_t* at;                                // where this lane's weights lie
};
// Are there registers enough to have all of it before it is needed?
template <int R> constexpr bool kUnitAhead = R < 8 || kManyLooks == 16;

// What a lane has of the sums of a group, by pairs of columns (Integers).
struct QuantisedSums {
    float first[4], last[4];
    float constants;  // over the lanes of an output
};

// kStay: weights are multiplied with a constant in them (integers.cuh), of one row.
template <typename T, int R, bool kStay> class QuantisedMultiplier {
    static_assert(!kStay || R == 1, "the correction is one row's");

public:
    __device__ __forceinline__ QuantisedMultiplier(Cursor& cursor, int chunks_of_x)
        : at(cursor), thread(kept(threadIdx.x)), warp(thread / 32), lane(thread % 32), chunks(chunks_of_x),
          from_lane(kStay ? of_lane() : 0) {}

    // So many groups; bit i of `int8` says of which format group i is. Each warp leaves a sum for each output, in its part of
    // `sums`.
    __device__ __forceinline__ void run(const BlockFacts& facts, int matrix, int groups, uint32_t int8, const T* x, float* sums) {
        if constexpr (!kStay) x += of_lane();
#pragma unroll 1
        for (;;) {  // groups of one format that follow each other
            const bool eight = int8 & 1u;
            const int others = __ffs(static_cast<int>(eight ? ~int8 : int8)) - 1, some = others < 0 ? groups : min(others, groups);
            if (eight) run_groups<DIJIANG_INT8>(facts.turns[matrix][1], facts.starts[matrix][1][warp], x, sums, some);
            else run_groups<DIJIANG_INT4>(facts.turns[matrix][0], facts.starts[matrix][0][warp], x, sums, some);
            groups -= some;
            if (groups == 0) break;
            sums += some * (R * kGroup);
            int8 >>= some;
        }
    }

private:
    static constexpr bool kHalves = R <= 4;
    Cursor& at;
    const uint32_t thread;
    const int warp, lane, chunks;
    const int from_lane;  // of_lane(), if the correction needs x itself

    // What a lane reads of x, from a block's first row on: rows beyond those that there are are others again.
    __device__ __forceinline__ int of_lane() const {
        const int row = kHalves ? lane / 4 % R : lane / 4;
        return row * kChunk + lane % 4 * 8 + (kHalves && lane >= 16 ? R * kChunk : 0);
    }
    // Reads this warp's unit of a round, if there are registers to have it in.
    template <int kFormat> __device__ __forceinline__ void load(QuantisedUnit<R>& to, const uint8_t* unit) const {
        constexpr int kScales = blocks_of_unit(kFormat == DIJIANG_INT8) * 2, kBytes = kHalves ? kScales / 2 : kScales;
        to.at = unit + lane * 16;
        if constexpr (kUnitAhead<R>) {
#pragma unroll
            for (int i = 0; i < kLoads; ++i) to.weights[i] = *reinterpret_cast<const uint4*>(unit + i * 512 + lane * 16);
            // A row's, or the half of them that this lane needs.
            const uint8_t* const scales = unit + kLoads * 512 + lane / 4 * kScales + (kHalves ? lane % 4 / 2 * kBytes : 0);
            if constexpr (kBytes == 8) {
                const uint2 some = *reinterpret_cast<const uint2*>(scales);
                to.scales[0] = some.x;
                to.scales[1] = some.y;
            } else {
#pragma unroll
                for (int i = 0; i < kBytes; i += 16) {
                    const uint4 some = *reinterpret_cast<const uint4*>(scales + i);
                    to.scales[i / 4] = some.x;
                    to.scales[i / 4 + 1] = some.y;
                    to.scales[i / 4 + 2] = some.z;
                    to.scales[i / 4 + 3] = some.w;
                }
            }
        }
    }
    // Groups of one format: warp w takes units w, w + 8, .. of all of them.
    template <int kFormat> __device__ __forceinline__ void run_groups(const Turns turns, uint32_t start, const T* x, float* to, int groups) {
        constexpr bool kEight = kFormat == DIJIANG_INT8;
        const int each = turns.units, total = groups * each;
        const int rounds = (total + kWarps - 1u) / kWarps, mine = (total - warp + kWarps - 1u) / kWarps;
        if (each < kWarps) {  // then some warps have nothing of some groups
#pragma unroll 1
            for (int i = lane; i < groups * R * kGroup; i += 32) to[i] = 0.0f;
            __syncwarp();
        }
        int unit = start % 256;  // of the group
        const int skip = turns.skip * (R * kGroup), rest = turns.rest;
        to += lane / 4 + start / 256 * (R * kGroup);
        const uint8_t* const units = at.bytes + warp * unit_bytes(kEight);
        QuantisedSums sum{};
        const Correction<kEight> correction(lane);
        QuantisedUnit<R> present;
        at.template arrive<1>(at.slot, at.parity);
        if (mine > 0) load<kFormat>(present, units + at.slot * kRoundBytes);
#pragma unroll 1
        for (int left = mine; left > 0; --left) {
            const uint32_t slot = at.slot;
            const int of_group = unit;
            float* const here = to;
            at.next();
            unit += rest;
            to += skip;
            const bool carry = unit >= each, ends = skip > 0 || carry;
            if (carry) unit -= each, to += R * kGroup;
            multiply<kFormat>(sum, present, of_group, x, correction);
            at.leave(slot);
            if (left > 1) {
                at.template arrive<1>(at.slot, at.parity);
                load<kFormat>(present, units + at.slot * kRoundBytes);
            }
            if (ends) leave_sum<kFormat>(sum, here);
        }
        if (mine < rounds) {
            if (mine > 0) at.template arrive<1>(at.slot, at.parity);
            at.leave();
        }
    }
    // Adds a unit's products. What is loaded and multiplied when is the compiler's choice: it needs registers for it.
    template <int kFormat>
    __device__ __forceinline__ void multiply(QuantisedSums& sum, const QuantisedUnit<R>& it, int unit, const T* x,
                                             const Correction<kFormat == DIJIANG_INT8>& correction) const {
        using It = Integers<T, kFormat, kStay>;
        constexpr int kBlocks = blocks_of_unit(kFormat == DIJIANG_INT8), kWords = 4 * kLoads / kBlocks;  // of a block
        const int chunk = max(min(unit * kBlocks, chunks - kBlocks), 0);  // the last unit ends with the columns
        const T* const from = x + from_lane + chunk * (R * kChunk);
        uint32_t words[4 * kLoads];
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            const uint4 some = kUnitAhead<R> ? it.weights[i] : *reinterpret_cast<const uint4*>(it.at + i * 512);
            words[4 * i] = some.x;
            words[4 * i + 1] = some.y;
            words[4 * i + 2] = some.z;
            words[4 * i + 3] = some.w;
        }
        const auto scale_of = [&](int number) {
            if constexpr (kUnitAhead<R>) {
                const float2 both = unpack<__half>(it.scales[number / 2]);
                return number % 2 ? both.y : both.x;
            } else {  // all of a row's
                const uint8_t* const scales = it.at - lane * 16 + kLoads * 512 + lane / 4 * (kBlocks * 2);
                return unpack<__half>(uint32_t{reinterpret_cast<const uint16_t*>(scales)[number]}).x;
            }
        };
#pragma unroll
        for (int b = 0; b < kBlocks; b += 2) {
            if constexpr (It::kConstant != 0.0f)  // in the middle it waits for nobody
                if (b == kBlocks / 2) correction.add(sum.constants, x + chunk * (R * kChunk), it.scales);
            uint32_t w[2][4];
#pragma unroll
            for (int i = 0; i < 2; ++i) It::widen(words + kWords * (b + i), w[i]);
            const uint4 v = *reinterpret_cast<const uint4*>(from + b * (R * kChunk));
            float c[4] = {};
            if constexpr (It::kFirst != It::kLast) {
                float d[4] = {};
                mma<T>(c, {w[0][0], w[1][0], w[0][1], w[1][1]}, v.x, v.y);
                mma<T>(d, {w[0][2], w[1][2], w[0][3], w[1][3]}, v.z, v.w);
                add_scaled(sum.last, scale_of(b / 2), d);
            } else {
                mma<T>(c, {w[0][0], w[1][0], w[0][1], w[1][1]}, v.x, v.y);
                mma<T>(c, {w[0][2], w[1][2], w[0][3], w[1][3]}, v.z, v.w);
            }
            if (kHalves) {
                add_scaled(sum.first, scale_of(b / 2), c);
            } else {  // half of what both blocks' weights make with one block's x is of use
                const uint4 u = *reinterpret_cast<const uint4*>(from + (b + 1) * (R * kChunk));
                float d[4] = {};
                mma<T>(d, {w[0][0], w[1][0], w[0][1], w[1][1]}, u.x, u.y);
                mma<T>(d, {w[0][2], w[1][2], w[0][3], w[1][3]}, u.z, u.w);
                const float even = scale_of(b / 2), odd = scale_of(kBlocks / 2 + b / 2);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    sum.first[i] = fmaf(even, c[i], sum.first[i]);
                    sum.first[2 + i] = fmaf(odd, d[2 + i], sum.first[2 + i]);
                }
            }
        }
    }
    // Of one row a lane has one sum of two in use; the compiler drops the others.
    static __device__ __forceinline__ void add_scaled(float (&sum)[4], float scale, const float (&c)[4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (R > 1 || i % 2 == 0) sum[i] = fmaf(scale, c[i], sum[i]);
    }
    template <int kFormat> __device__ __forceinline__ void leave_sum(QuantisedSums& of, float* to) const {
        using It = Integers<T, kFormat, kStay>;
        float sum[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] = It::kFirst != It::kLast ? of.first[i] * It::kFirst + of.last[i] * It::kLast : of.first[i] * It::kFirst;
        const int row = lane % 4 * 2;
        float one = sum[0], other = sum[1];
        if (kHalves) {
            if (lane % 4 >= 2) one = sum[2], other = sum[3];
            if constexpr (It::kConstant != 0.0f) {  // both lanes of a half have its blocks' products
                one -= It::kConstant * (of.constants + __shfl_xor_sync(~0u, of.constants, 1));
            }
            one += __shfl_xor_sync(~0u, one, 2);
            if (R > 1) other += __shfl_xor_sync(~0u, other, 2);
        } else {
            one += sum[2];
            other += sum[3];
        }
        if (row < R) to[row * kGroup] = one;
        if (row + 1 < R) to[(row + 1) * kGroup] = other;
        of = {};
    }
};

}  // namespace step
}  // namespace dijiang
