// Tiles of 16-bit elements in shared memory as wgmma reads them.
//
// A tile of R rows lies in blocks of W columns (64, 32 or 16: 128, 64 or 32 bytes, one after the other), each R rows
// of W elements. Pieces of 16 bytes are swizzled: bits 4 and up of the address are xored with as many bits from 7 on.
// So eight rows' pieces of the same columns, or a row's pieces, lie in different banks. One tile serves as an operand
// in both directions. Blocks begin at multiples of 16 W bytes.
#pragma once

#include <cstdint>

#include "device/copies.cuh"
#include "device/elements.cuh"

namespace dijiang {

// An address in shared memory as operands have it. Addresses have the block's number in its cluster from bit 24 on, which
// would be added to the bytes from block to block of an operand's columns.
__device__ __forceinline__ uint32_t operand_address(uint32_t address) { return address & 0xffffff; }

template <int W> struct Tiles {
    static constexpr int kRow = 2 * W;  // bytes
    static constexpr uint64_t kCode = W == 64 ? 1 : W == 32 ? 2 : 3;

    // Bytes from the tile's start to an element.
    static __device__ __forceinline__ uint32_t offset(int rows, int row, int column) {
        const int turned = column % W / 8 ^ (row * kRow / 128 & W / 8 - 1);
        return column / W * (rows * kRow) + row * kRow + turned * 16 + column % 8 * 2;
    }
    // The same in two steps: of a row, then of the row's n-th 8 columns. What is added to `start` before must be a
    // multiple of 128, but for bit 4, which chooses the neighbour of an even n.
    static __device__ __forceinline__ uint32_t start(int row) { return offset(0, row, 0); }
    static __device__ __forceinline__ uint32_t piece(uint32_t start, int rows, int n) {
        return (start ^ n % (W / 8) * 16) + n / (W / 8) * (rows * kRow);
    }
    // `tile`, where blocks have neighbours in a cluster: operand_address().
    // The operand whose 16 inner elements, the tile's columns 16 k to 16 k + 15, are neighbours; its outer ones are
    // rows.
    static __device__ __forceinline__ uint64_t across(uint32_t tile, int rows, int k) {
        return describe(tile, 16 * k / W * (rows * kRow) + 16 * k % W * 2, 16);
    }
    // The operand whose outer elements, columns from `first` on, are neighbours; its 16 inner ones are rows from 16 k
    // on. The columns lie in one block, or begin with one.
    static __device__ __forceinline__ uint64_t down(uint32_t tile, int rows, int first, int k) {
        return describe(tile + first / W * (rows * kRow) + first % W * 2, 16 * k * kRow, rows * kRow);
    }

private:
    // Fields: start, bytes from block to block, bytes from eight rows to the next eight, kind of swizzle. Shared
    // memory ends below what the first field holds: operands of one tile differ by a constant.
    static __device__ __forceinline__ uint64_t describe(uint32_t start, uint32_t more, uint32_t block) {
        const uint32_t low = (start >> 4) + ((more >> 4) | (block >> 4) << 16);
        return static_cast<uint64_t>(low) | static_cast<uint64_t>(8 * kRow >> 4) << 32 | kCode << 62;
    }
};

}  // namespace dijiang
