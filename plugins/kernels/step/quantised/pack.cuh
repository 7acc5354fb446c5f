// A quantised matrix to its places in the packed weights, once per model.
#pragma once

#include "step/quantised/layout.h"

namespace dijiang {
namespace step {

// One of a model's matrices, as a bundle has it.
struct QuantisedSource {
    const uint8_t* values;   // [rows][blocks of 32][32], or [16] with two int4 to a byte
    const uint16_t* scales;  // [rows][blocks]
    int32_t matrix;          // dijiang_step_matrix
    int32_t eight;           // 1: int8
};

// Which row of that matrix is a packed row; -1: one of another matrix; -2: there is none, zeros.
DIJIANG_BOTH int row_of(const Layout& it, int matrix, int packed_row, int wanted) {
    const Source source = source_of(it, matrix, packed_row);
    if (source.tensor < 0) return -2;
    const int q = it.width(), k = q + it.kv_heads * it.head_dim;
    switch (wanted) {
        case DIJIANG_STEP_Q: return source.tensor == 0 && source.row < q ? source.row : -1;
        case DIJIANG_STEP_K: return source.tensor == 0 && source.row >= q && source.row < k ? source.row - q : -1;
        case DIJIANG_STEP_V: return source.tensor == 0 && source.row >= k ? source.row - k : -1;
        case DIJIANG_STEP_GATE:
        case DIJIANG_STEP_MLP_GATE: return source.tensor == 1 ? source.row : -1;
        default: return source.tensor == 0 ? source.row : -1;
    }
}

// Eight neighbouring elements of a row's block, as a unit has them: one word of int4, or two of int8.
DIJIANG_BOTH void pack_eight(const QuantisedSource& from, int64_t block, int quarter, bool eight, uint32_t (&words)[2]) {
    words[0] = words[1] = 0;
    for (int i = 0; i < 8; ++i) {
        const uint8_t byte = from.eight ? from.values[block * 32 + quarter * 8 + i] : from.values[block * 16 + quarter * 4 + i / 2];
        const uint32_t four = i % 2 ? byte >> 4 : byte & 15;
        if (eight) words[i / 4] |= (from.eight ? byte : four + 120u) << (8 * (i % 4));
        else words[0] |= four << (i % 2 * 16 + i / 2 % 2 * 8 + i / 4 * 4);
    }
}

// A thread for a lane's 16 bytes of a unit, and its row's scales. begin: of the matrix, in bytes.
__global__ void pack_quantised_matrix(Layout it, uint32_t formats, int matrix, int64_t begin, QuantisedSource from, uint8_t* packed) {
    const int chunks = it.chunks(matrix), most = units_of_group(chunks, true);
    const int64_t total = int64_t{it.groups(matrix)} * most * 32, step = int64_t{gridDim.x} * blockDim.x;
    for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < total; i += step) {
        const int lane = static_cast<int>(i % 32), unit = static_cast<int>(i / 32 % most), group = static_cast<int>(i / 32 / most);
        int which;
        const bool eight = group_is_int8(it, formats, matrix, matrix == kAttention ? it.part_of(group, which) : 0);
        const int row = row_of(it, matrix, group * kGroup + lane / 4, from.matrix);
        if (row == -1 || unit >= units_of_group(chunks, eight)) continue;
        const int blocks = blocks_of_unit(eight), last = chunks - blocks;
        const int first = unit * blocks < last ? unit * blocks : last > 0 ? last : 0;
        uint8_t* const to = packed + begin + bytes_before(it, formats, matrix, group) + int64_t{unit} * unit_bytes(eight);
        for (int b = 0; b < blocks; ++b) {
            const int chunk = first + b;
            const bool there = row >= 0 && chunk >= unit * blocks && chunk < chunks;
            const int64_t block = int64_t{row} * chunks + chunk;
            uint32_t words[2] = {eight ? 0x80808080u : 0x88888888u, 0x80808080u};
            if (there) pack_eight(from, block, lane % 4, eight, words);
            const int word = eight ? 2 * b : b;  // a load has four
            uint32_t* const weights = reinterpret_cast<uint32_t*>(to + word / 4 * 512 + lane * 16) + word % 4;
            weights[0] = words[0];
            if (eight) weights[1] = words[1];
            if (lane % 4 == 0)
                reinterpret_cast<uint16_t*>(to + 512 * kLoads)[lane / 4 * blocks + b % 2 * (blocks / 2) + b / 2] =
                    there ? from.scales[block] : uint16_t{0};
        }
    }
}

}  // namespace step
}  // namespace dijiang
