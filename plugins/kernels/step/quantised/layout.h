// Where quantised weights lie in the packed stream. Plain arithmetic, for host and device.
//
// A ROUND is what a block's eight warps multiply at a time: up to eight UNITS that follow each other, one for each warp, of
// groups of one format that follow each other in a batch. A unit is 8 rows x 512 columns in int4, 8 x 256 in int8: four times
// 512 bytes of weights, 16 of each lane (g, t), and behind them the scales, float16, of row 0's blocks of 32 columns, the
// even ones, then the odd ones, then row 1's ... So 2304 or 2176 bytes: few instructions are beside those that multiply. Of
// each block in turn lane (g, t) has columns 8 t to 8 t + 7 of row g: int8 as q + 128, a byte each; int4 as q + 8 in a word
// whose bits from 0, 8, 4, 12 on are columns 8 t, 8 t + 2, + 4, + 6, and those 16 above them the next one each: so what one
// mask finds is an operand of mma.m16n8k16 (integers.cuh).
//
// The last unit of a group ends with its columns: its blocks that the one before it has too are zeros. Where there are fewer
// columns than a unit has, the rest are zeros, and so is what they are multiplied with (Memory::padded).
//
// A group has one format. Where rows of a group come from an int4 and an int8 matrix (SwiGLU), it is int8: no bit is lost.
// Attention's groups are dealt out in turns, of q as many as query heads share a key/value head, one of k, as many of gate as
// of q and one of v, so that all blocks have as many in int8; in a block those of q come first, then of k, gate and v, so that
// those of a format follow each other.
//
// The stream goes by layer, by matrix in the order of a step, by group, by unit.
#pragma once

#include "step/layout.h"

namespace dijiang {
namespace step {

constexpr int kLoads = 4;                // of 16 bytes, that a lane makes of a unit; half of a row's scales is 8 bytes at least
constexpr int kMostBlocks = 4 * kLoads;  // of 32 columns in a unit
constexpr int kMostNarrow = 1024;        // columns of the residual stream
constexpr int kRoundBytes = kWarps * (512 * kLoads + 16 * kMostBlocks);  // at most

DIJIANG_BOTH constexpr int blocks_of_unit(bool eight) { return eight ? kMostBlocks / 2 : kMostBlocks; }
DIJIANG_BOTH constexpr int unit_bytes(bool eight) { return 512 * kLoads + 16 * blocks_of_unit(eight); }
DIJIANG_BOTH int units_of_group(int chunks, bool eight) {
    const uint32_t blocks = blocks_of_unit(eight);
    return static_cast<int>((static_cast<uint32_t>(chunks) + blocks - 1) / blocks);
}
DIJIANG_BOTH int group_bytes(int chunks, bool eight) { return units_of_group(chunks, eight) * unit_bytes(eight); }

DIJIANG_BOTH uint32_t formats_of(const Layout& it, int layer) { return layer < it.layers ? it.int8[layer] : it.head_int8 ? ~0u : 0u; }

DIJIANG_BOTH bool bit(uint32_t bits, int number) { return (bits >> number & 1u) != 0; }

// The dijiang_step_matrix of a part of attention, without branches.
DIJIANG_BOTH constexpr int matrix_of(int part) { return part ^ part >> 1; }
static_assert(matrix_of(kPartQ) == DIJIANG_STEP_Q && matrix_of(kPartK) == DIJIANG_STEP_K, "q and k");
static_assert(matrix_of(kPartGate) == DIJIANG_STEP_GATE && matrix_of(kPartV) == DIJIANG_STEP_V, "gate and v");

// Is a group int8? formats: of its layer. part: of one of attention's groups.
DIJIANG_BOTH bool group_is_int8(const Layout& it, uint32_t formats, int matrix, int part) {
    switch (matrix) {
        case kAttention: return bit(formats, matrix_of(part));
        case kUp: return bit(formats, DIJIANG_STEP_UP) || (it.gated != 0 && bit(formats, DIJIANG_STEP_MLP_GATE));
        case kDown: return bit(formats, DIJIANG_STEP_DOWN);
        case kDense: return bit(formats, DIJIANG_STEP_DENSE);
        default: return it.head_int8 != 0;
    }
}

// Bytes of so many groups of attention, of which so many are int8.
DIJIANG_BOTH int64_t attention_bytes(const Layout& it, int groups, int eights) {
    const int64_t four = group_bytes(it.chunks(kAttention), false);
    return groups * four + eights * (group_bytes(it.chunks(kAttention), true) - four);
}
// Bytes of a matrix' packed groups before one.
DIJIANG_BOTH int64_t bytes_before(const Layout& it, uint32_t formats, int matrix, int group) {
    if (matrix != kAttention) return int64_t{group} * group_bytes(it.chunks(matrix), group_is_int8(it, formats, matrix, 0));
    const int block = it.owner(matrix, group), first = it.share(matrix, block), next = it.share(matrix, block + 1);
    int eights = 0, left = group - first;
    for (int part = 0; part < kParts; ++part) {
        const int before = it.dealt(part, first), all = it.dealt(part, next) - before, some = left < all ? left : all;
        if (group_is_int8(it, formats, kAttention, part)) eights += before + some;
        left -= some;
    }
    return attention_bytes(it, group, eights);
}
DIJIANG_BOTH int64_t matrix_bytes(const Layout& it, uint32_t formats, int matrix) {
    if (matrix != kAttention) return bytes_before(it, formats, matrix, it.groups(matrix));
    int eights = 0;
    for (int part = 0; part < kParts; ++part) eights += group_is_int8(it, formats, matrix, part) ? it.part_groups(part) : 0;
    return attention_bytes(it, it.groups(matrix), eights);
}
// Of layers before one, or of all of them.
DIJIANG_BOTH int64_t layer_begin(const Layout& it, int layer) {
    int64_t sum = 0;
    for (int l = 0; l < layer; ++l)
        for (int m = kAttention; m <= kDense; ++m) sum += matrix_bytes(it, formats_of(it, l), m);
    return sum;
}
// Where a matrix begins. The head comes last.
DIJIANG_BOTH int64_t matrix_begin(const Layout& it, int layer, int matrix) {
    if (matrix == kHead) return layer_begin(it, it.layers);
    int64_t at = layer_begin(it, layer);
    for (int turn = 0; it.at(turn) != matrix; ++turn) at += matrix_bytes(it, formats_of(it, layer), it.at(turn));
    return at;
}

// With one row and float16 wide models have a kernel of their own (kernel.cuh).
constexpr bool has_wide(int dtype, int capacity) { return dtype == DIJIANG_FLOAT16 && capacity == 1; }
inline bool is_wide(const Layout& it) { return it.hidden > kMostNarrow; }

// What is behind the weights.
DIJIANG_BOTH int64_t constants_begin(const Layout& it) {
    if (!it.quantised) return it.total_units() * kUnitBytes;
    return (matrix_begin(it, it.layers, kHead) + matrix_bytes(it, 0, kHead) + 127) / 128 * 128;
}
DIJIANG_BOTH int64_t ends_begin(const Layout& it) { return constants_begin(it) + it.layers * Constants(it).size; }
DIJIANG_BOTH int64_t packed_bytes(const Layout& it) { return ends_begin(it) + ends_bytes(it); }

}  // namespace step
}  // namespace dijiang
