// Who owns which rows, and where a weight lies in the packed stream. Plain arithmetic, for host and device.
//
// A block's weights are one run of UNITS, in the order in which its warps take them: by matrix, by group of eight rows, by
// chunk of 32 columns. A unit is 8 rows x 32 columns, 512 bytes: lane (g, t) = (lane / 4, lane % 4) reads row g, columns 8t to
// 8t + 7, as 16 bytes in which the second and third pair have changed places. So a warp's read is free of bank conflicts, and
// is an operand of mma.m16n8k16 as it comes, if the other side's columns are taken in the same order.
//
// Units pass through SLOTS of shared memory, 32 in each; of a slot warp w takes units w, w + 8, w + 16 and w + 24. A batch of
// groups begins in a slot of its own, whose last may be filled in part. Of quantised weights quantised/layout.h says more.
#pragma once

#include <cstdint>

#include "dijiang/step.h"

#ifdef __CUDACC__
#define DIJIANG_BOTH __host__ __device__ __forceinline__
#else
#define DIJIANG_BOTH inline
#endif

namespace dijiang {
namespace step {

constexpr int kWarps = 8;            // that multiply; one more copies
constexpr int kThreads = kWarps * 32;
constexpr int kGroup = 8;            // rows of a unit
constexpr int kChunk = 32;           // columns of a unit
constexpr int kUnitBytes = 512;
constexpr int kPerSlot = 4;          // units that a warp takes of a slot
constexpr int kSlotUnits = kPerSlot * kWarps, kSlotBytes = kSlotUnits * kUnitBytes;
constexpr int kPieces = 2;           // that a slot is copied in
constexpr int kPieceUnits = kSlotUnits / kPieces, kPieceBytes = kPieceUnits * kUnitBytes;
constexpr int kBatch = 16;           // groups of rows that a block multiplies at a time

enum Matrix { kAttention, kUp, kDown, kDense, kHead, kMatrices };
constexpr int kOfLayer = 4;          // but for the head
// Of attention's rows, in the order in which a block has them if they are quantised.
enum AttentionPart { kPartQ, kPartK, kPartGate, kPartV, kParts };

struct Layout {
    int32_t layers, hidden, inner, vocabulary, heads, kv_heads, head_dim, rotary_dim;
    int32_t gated, parallel, table_rows, blocks;
    int32_t quantised, head_int8;  // 1: matrices are int8 or int4; the head is int8
    uint8_t int8[DIJIANG_STEP_MAX_LAYERS];  // if quantised, of each layer: bit m for a dijiang_step_matrix m in int8

    DIJIANG_BOTH int width() const { return heads * head_dim; }
    DIJIANG_BOTH int qkv() const { return (heads + 2 * kv_heads) * head_dim; }
    // Rows of a matrix in groups of eight; the head's last group may be partly zeros.
    DIJIANG_BOTH int groups(int matrix) const {
        switch (matrix) {
            case kAttention: return (qkv() + width()) / kGroup;
            case kUp: return (gated ? 2 : 1) * inner / kGroup;
            case kHead: return (vocabulary + kGroup - 1) / kGroup;
            default: return hidden / kGroup;
        }
    }
    DIJIANG_BOTH int chunks(int matrix) const {
        return (matrix == kDown ? inner : matrix == kDense ? width() : hidden) / kChunk;
    }
    // Block b owns groups share(b) to share(b + 1) of a matrix.
    DIJIANG_BOTH int share(int matrix, int block) const {
        return static_cast<int>(static_cast<uint32_t>(block) * static_cast<uint32_t>(groups(matrix)) / blocks);
    }
    DIJIANG_BOTH int owner(int matrix, int group) const {
        return static_cast<int>(((static_cast<uint32_t>(group) + 1) * blocks - 1) / groups(matrix));
    }
    DIJIANG_BOTH int units(int matrix, int block) const {
        return (share(matrix, block + 1) - share(matrix, block)) * chunks(matrix);
    }
    // Quantised: how many groups of a part are among the first so many that are dealt out, in turns (quantised/layout.h).
    DIJIANG_BOTH int dealt(int part, int groups) const {
        const int sharing = heads / kv_heads, turn = 2 * sharing + 2, whole = groups / turn;
        const int size = part % 2 == 0 ? sharing : 1, some = groups - whole * turn - part / 2 * (sharing + 1) - part % 2 * sharing;
        return whole * size + (some < 0 ? 0 : some < size ? some : size);
    }
    DIJIANG_BOTH int part_groups(int part) const { return (part % 2 == 0 ? heads : kv_heads) * head_dim / kGroup; }
    // A part's first group of the rows of q, k, v and gate.
    DIJIANG_BOTH int part_begin(int part) const {
        const int before = part == kPartQ ? 0 : part == kPartK ? width() : part == kPartGate ? qkv() : width() + kv_heads * head_dim;
        return before / kGroup;
    }
    // Quantised: the part that the packed group `group` is of, and which of that part's groups it is.
    DIJIANG_BOTH int part_of(int group, int& which) const {
        const int block = owner(kAttention, group), first = share(kAttention, block), next = share(kAttention, block + 1);
        which = group - first;
        for (int part = 0;; ++part) {
            const int before = dealt(part, first), some = dealt(part, next) - before;
            if (which < some) return which += before, part;
            which -= some;
        }
    }
    // Which group of the rows of q, k, v and gate is the packed group `group`.
    DIJIANG_BOTH int attention_group(int group) const {
        if (!quantised) return group;
        int which;
        const int part = part_of(group, which);
        return part_begin(part) + which;
    }
    // The order of a layer's matrices: attention, up, down, dense, or one after the other attention, dense, up, down.
    DIJIANG_BOTH int at(int turn) const { return parallel || turn == 0 ? turn : (turn + 1) % 3 + 1; }
    DIJIANG_BOTH int layer_units(int block) const {
        return units(kAttention, block) + units(kUp, block) + units(kDown, block) + units(kDense, block);
    }
    // Units before a block's: its stream begins there.
    DIJIANG_BOTH int64_t begin(int block) const {
        int64_t layer = 0;
        for (int m = kAttention; m <= kDense; ++m) layer += int64_t{share(m, block)} * chunks(m);
        return layers * layer + int64_t{share(kHead, block)} * chunks(kHead);
    }
    DIJIANG_BOTH int64_t total_units() const { return begin(blocks); }
    DIJIANG_BOTH int64_t stream_units(int block) const { return begin(block + 1) - begin(block); }
    // Units of the block's stream before its part of a layer's matrix. The head comes last.
    DIJIANG_BOTH int64_t start(int block, int layer, int matrix) const {
        int64_t at = int64_t{matrix == kHead ? layers : layer} * layer_units(block);
        if (matrix == kHead) return at;
        for (int turn = 0; this->at(turn) != matrix; ++turn) at += units(this->at(turn), block);
        return at;
    }
};

// To divide by x: 2^32 over it, rounded up. Exact while the number times x is below 2^32.
DIJIANG_BOTH uint64_t inverse_of(int x) { return x ? 0xffffffffu / static_cast<uint32_t>(x) + uint64_t{1} : 0; }
DIJIANG_BOTH int divide(int x, uint64_t by) { return static_cast<int>(static_cast<uint32_t>(x) * by >> 32); }

// The unit of group `group` and chunk `chunk` of a matrix, counted from the beginning of the packed weights.
DIJIANG_BOTH int64_t unit_of(const Layout& it, int layer, int matrix, int group, int chunk) {
    const int block = it.owner(matrix, group);
    return it.begin(block) + it.start(block, layer, matrix) + int64_t{group - it.share(matrix, block)} * it.chunks(matrix) + chunk;
}

// Behind the units: what is not multiplied by mma, float32 but for P. Offsets in bytes.
struct Constants {
    int64_t attention_norm, mlp_norm;                      // {weight, bias} [h]
    int64_t attention_bias, up_bias, dense_bias, down_bias;  // up_bias in the order of the packed rows
    int64_t group_norm;                                    // {weight, bias} [A]
    int64_t proj;                                          // units of P^T, columns padded with zeros to 32
    int64_t terms;                                         // log_decay [H], or log_decay, gain, read_scale [N, H]
    int64_t size;                                          // of a layer

    Constants() = default;
    explicit DIJIANG_BOTH Constants(const Layout& it) {
        const int64_t h = 4 * int64_t{it.hidden};
        attention_norm = 0;
        mlp_norm = 2 * h;
        attention_bias = mlp_norm + 2 * h;
        up_bias = attention_bias + 4 * int64_t{it.groups(kAttention)} * kGroup;
        dense_bias = up_bias + 4 * int64_t{it.groups(kUp)} * kGroup;
        down_bias = dense_bias + h;
        group_norm = down_bias + h;
        proj = group_norm + 8 * int64_t{it.width()};
        terms = proj + int64_t{it.head_dim / kGroup} * proj_chunks(it) * kUnitBytes;
        size = terms + 4 * int64_t{it.heads} * (it.table_rows ? 3 * int64_t{it.table_rows} : 1);
        size = (size + 127) / 128 * 128;
    }
    static DIJIANG_BOTH int proj_chunks(const Layout& it) { return (it.head_dim + kChunk - 1) / kChunk; }
};
// The final norm's weights and biases, {weight, bias} [h], then inv_freq.
DIJIANG_BOTH int64_t ends_bytes(const Layout& it) {
    return (8 * int64_t{it.hidden} + 4 * int64_t{it.rotary_dim / 2} + 127) / 128 * 128;
}

// Which row of which tensor is packed row `row`. With SwiGLU a group is four rows of the gate and the four of up that they
// open, so that one block has both.
struct Source {
    int tensor, row;  // tensor 0: qkv, up, dense, down, head; 1: gate, mlp_gate; -1: zeros
};
DIJIANG_BOTH Source source_of(const Layout& it, int matrix, int row) {
    if (matrix == kAttention) {
        row = it.attention_group(row / kGroup) * kGroup + row % kGroup;
        return row < it.qkv() ? Source{0, row} : Source{1, row - it.qkv()};
    }
    if (matrix == kUp && it.gated) {
        const int within = row % kGroup, first = row / kGroup * 4;
        return within < 4 ? Source{1, first + within} : Source{0, first + within - 4};
    }
    if (matrix == kHead && row >= it.vocabulary) return {-1, 0};
    return {0, row};
}

}  // namespace step
}  // namespace dijiang
