// A block's integers as 16-bit floats for the tensor cores, in as few instructions as they lie for.
//
// A bit pattern with an integer in its last bits is that integer times what the last bit is worth, and perhaps a constant more.
// To subtract the constant takes an instruction a pair (device/widen.cuh). Where it may stay, weights are u = q + c instead of
// q, and a block with scale s adds s c (x_0 + .. + x_31) too much, which Correction finds for a whole unit at once.
//
// With float16 u is a subnormal: its last bit is worth 2^-24, which tensor cores multiply as any other number, and c is 8 or
// 128. So what is subtracted is about as large as what it is subtracted from. 1024 + u, a normal number, would lose 7 bits.
// With bfloat16 products of subnormals would be subnormal, and integers stay as they are.
#pragma once

#include "device/widen.cuh"
#include "step/instructions.cuh"
#include "step/quantised/layout.h"

namespace dijiang {
namespace step {

// A lane's eight columns of a block, as pairs of T. Sums of products with the first two pairs times kFirst, and with the
// others times kLast, are those with q + kConstant.
template <typename T, int kFormat, bool kStay> struct Integers {
    static constexpr float kFirst = 1.0f, kLast = 1.0f, kConstant = 0.0f;

    static __device__ __forceinline__ void widen(const uint32_t* q, uint32_t (&pairs)[4]) {
        if constexpr (kFormat == DIJIANG_INT4) {
            widen4<T>(q[0], pairs);
            const uint32_t second = pairs[2];
            pairs[2] = pairs[1];
            pairs[1] = second;
        } else {
            widen8<T>(q[0], q[1], pairs);
        }
    }
};
template <> struct Integers<__half, DIJIANG_INT4, true> {
    static constexpr float kFirst = 0x1p24f, kLast = 0x1p20f, kConstant = 8.0f;

    static __device__ __forceinline__ void widen(const uint32_t* q, uint32_t (&pairs)[4]) {
        const uint32_t up = q[0] >> 8;
        pairs[0] = q[0] & 0x000f000fu;
        pairs[1] = up & 0x000f000fu;
        pairs[2] = q[0] & 0x00f000f0u;
        pairs[3] = up & 0x00f000f0u;
    }
};
template <> struct Integers<__half, DIJIANG_INT8, true> {
    static constexpr float kFirst = 0x1p24f, kLast = 0x1p24f, kConstant = 128.0f;

    static __device__ __forceinline__ void widen(const uint32_t* q, uint32_t (&pairs)[4]) {
        pairs[0] = __byte_perm(q[0], 0, 0x4140);
        pairs[1] = __byte_perm(q[0], 0, 0x4342);
        pairs[2] = __byte_perm(q[1], 0, 0x4140);
        pairs[3] = __byte_perm(q[1], 0, 0x4342);
    }
};

// Of a unit's rows, the sum over all columns of scale times x. Tensor cores make it: A is the scales as a lane has them, two
// words of eight of its half of the blocks for the outputs 0 to 7, and two for 8 to 15, which here are the same outputs; k
// goes over blocks, and a column of B has an element of each. Which, is no matter if each comes once: so the rows that a matrix
// of ldmatrix has are in different banks.
template <bool kEight> class Correction {
public:
    __device__ __forceinline__ explicit Correction(int lane) {
        const int matrix = lane / 8, row = lane % 8, half = row / 4, odd = row % 2;
        const int block = half + 2 * odd + (kEight ? matrix / 2 * 4 : matrix % 2 * 8);
        const int quarter = ((kEight ? matrix % 2 : matrix / 2) * 2 + row / 2 % 2) ^ 2 * odd;
        from_ = block * kChunk + quarter * 8;
    }
    // Adds a unit's, over the lanes of an output. x: the first block's.
    __device__ __forceinline__ void add(float& to, const __half* x, const uint32_t* scales) const {
        const __half* const rows = x + from_;
        uint32_t one[4], other[4];
        float sum[4] = {}, rest[4] = {};
        load_transposed(one, rows);
        if constexpr (kEight) {
            mma<__half>(sum, {scales[0], scales[1], scales[0], scales[1]}, one[0], one[1]);
            mma<__half>(rest, {scales[0], scales[1], scales[0], scales[1]}, one[2], one[3]);
        } else {
            load_transposed(other, rows + 4 * kChunk);
            mma<__half>(sum, {scales[0], scales[1], scales[2], scales[3]}, one[0], one[1]);
            mma<__half>(rest, {scales[0], scales[1], scales[2], scales[3]}, other[0], other[1]);
            mma<__half>(sum, {scales[0], scales[1], scales[2], scales[3]}, one[2], one[3]);
            mma<__half>(rest, {scales[0], scales[1], scales[2], scales[3]}, other[2], other[3]);
        }
        to += (sum[0] + sum[1]) + (rest[2] + rest[3]);
    }

private:
    int from_;  // of the row that this lane has ldmatrix read
};

}  // namespace step
}  // namespace dijiang
