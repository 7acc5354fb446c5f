// Quantised weights in registers: how they lie in memory, and what becomes of them.
//
// A tile is 8 output elements; a chunk of it is what one load of 16 bytes a lane brings: 64 elements of K in int8,
// 128 in int4. Thread (g, c) of a warp has output element g, and of each block of 32 along K the pairs from 8 p + 2 c on:
// B of two m16n8k16. After a chunk's 512 bytes lie its
// scales, float16: of thread c, block by block, those of output elements 2 c and 2 c + 1, which it has sums of.
#pragma once

#include "device/widen.cuh"
#include "linear/quantized/quantized.h"

namespace dijiang {
namespace quantized {

// Block `b` of a chunk.
template <typename T, int kFormat>
__device__ __forceinline__ void widen(const uint4& chunk, int b, uint32_t (&pairs)[4]) {
    if constexpr (kFormat == DIJIANG_INT4) {
        const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
        widen4<T>(words[b], pairs);
    } else {
        if (b == 0) widen8<T>(chunk.x, chunk.y, pairs);
        else widen8<T>(chunk.z, chunk.w, pairs);
    }
}

}  // namespace quantized
}  // namespace dijiang
