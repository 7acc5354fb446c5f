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

// Where this warp is in a block's groups of a matrix.
struct Rounds {
    int group, unit;  // the warp's unit of the present round, if the group has so many
    int stripe, units;
    bool eight;
};

template <typename T, int R> class QuantisedMultiplier {
public:
    __device__ __forceinline__ QuantisedMultiplier(Cursor& cursor, const Layout& of, int which, uint32_t bits, int chunks_of_x, int stripe)
        : at(cursor), layout(of), matrix(which), formats(bits), warp(threadIdx.x / 32), lane(threadIdx.x % 32),
          chunks(chunks_of_x) {
        now.group = 0;
        now.stripe = stripe;
        begin_group(now);
    }

    // Reads the first round's units: before x is waited for.
    __device__ __forceinline__ void fetch(QuantisedUnit& first) {
        at.template arrive<1>(at.slot, at.parity);
        read(first, now);
    }

    // The groups before `end`, of those not yet done. Each warp leaves a sum for each output, in its part of `sums`.
    __device__ __forceinline__ void run(QuantisedUnit present, const T* x, int end, float* sums) {
        const int row = kHalves ? lane / 4 % R : lane / 4;  // beyond the rows others again, whose results are left
        x += row * kChunk + lane % 4 * 8 + (kHalves && lane >= 16 ? 4 : 0);
        sums += lane / 4;
        float sum[4] = {};
#pragma unroll 1
        for (;;) {
            Rounds then = now;
            const bool ends = advance(then), more = then.group < end;
            QuantisedUnit next;
            const bool early = more && mbarrier_is_done(at.full + at.slot, at.parity);
            if (early) read(next, then);
            if (now.unit < now.units) {
                if (now.eight) multiply<DIJIANG_INT8>(sum, present, x);
                else multiply<DIJIANG_INT4>(sum, present, x);
            }
            at.leave(present.slot);
            if (ends) {
                leave_sum(sum, sums);
                sums += R * kGroup;
            }
            now = then;
            if (!more) break;
            if (!early) fetch(next);
            present = next;
        }
    }

private:
    static constexpr bool kHalves = R <= 4;
    Cursor& at;
    const Layout& layout;
    const int matrix;
    const uint32_t formats;
    const int warp, lane, chunks;
    Rounds now;

    __device__ __forceinline__ void begin_group(Rounds& it) const {
        it.unit = warp;
        it.eight = group_is_int8(layout, formats, matrix, it.stripe);
        it.units = units_of_group(chunks, it.eight);
    }
    // To the next round. True behind the last of a group.
    __device__ __forceinline__ bool advance(Rounds& it) const {
        it.unit += kWarps;
        if (it.unit - warp < it.units) return false;
        ++it.group;
        if (++it.stripe == layout.stripes) it.stripe = 0;
        begin_group(it);
        return true;
    }
    // This warp's unit of a round that is there, and on to the next slot.
    __device__ __forceinline__ void read(QuantisedUnit& to, const Rounds& it) {
        to.slot = at.slot;
        if (it.unit < it.units) {
            const uint8_t* const unit = at.bytes + at.slot * kRoundBytes + warp * unit_bytes(it.eight);
            to.weights = *reinterpret_cast<const uint4*>(unit + lane * 16);
            const uint8_t* const scales = unit + 512;
            if (it.eight) to.scales.x = *reinterpret_cast<const uint32_t*>(scales + lane / 4 * 4);
            else to.scales = *reinterpret_cast<const uint2*>(scales + lane / 4 * 8);
        }
        at.next();
    }
    template <int kFormat> __device__ __forceinline__ void multiply(float (&sum)[4], const QuantisedUnit& unit, const T* x) const {
        constexpr int kBlocks = kFormat == DIJIANG_INT4 ? 4 : 2;
        const int first = max(min(now.unit * kBlocks, chunks - kBlocks), 0);  // the last unit ends with the columns
        const T* const from = x + first * (R * kChunk);
        const uint32_t words[4] = {unit.weights.x, unit.weights.y, unit.weights.z, unit.weights.w};
        const uint32_t scales[2] = {unit.scales.x, unit.scales.y};
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
