// A step in one launch: what the host's plan hands to the kernel.
#pragma once

#include <cuda_runtime_api.h>

#include "step/quantised/layout.h"

namespace dijiang {
namespace step {

constexpr int kMostSlots = 16, kMostRounds = 24;  // of weights in the ring: slots, of quantised ones rounds
constexpr int kBarriers = 2 * 8 * kMostRounds;     // bytes of shared memory: the ring's barriers, of either
constexpr int kHeader = 1024;      // and BlockFacts behind them
constexpr int kCopier = kThreads;  // the first thread of the warp that copies

// Shared memory of a block, in bytes from its beginning. x holds rows to be multiplied, as [chunk][row][32] of T.
struct Memory {
    int32_t ring;
    int32_t x1, x2, raw;           // the residual stream, normalised (once or twice), and as it came: float32 [row][h]
    int32_t up, attended;          // the MLP's inner values; attention's output
    int32_t outputs, gates;        // where heads are no power of two: float32 and T [row][A], before GroupNorm
    int32_t sums;                  // of each warp: [warp][group][row][8]
    int32_t own;                   // this block's rows of the residual stream: [group][row][8]
    int32_t statistics;            // [row][warp] of float2: sums, and of squares
    int32_t means;                 // of each row of the residual stream, as last normalised
    int32_t rotary;                // [row][r/2] of cosine and sine
    int32_t turned;                // q and k after RoPE, upper and lower halves: T [2][chunk][2 rows][32]
    int32_t features;              // [2 rows][d]
    int32_t values, opened;        // [row][columns]; pairs of gates, in T
    int32_t terms;                 // [row] of decay, gain, read scale
    int32_t readout;               // [row][entry][columns]
    int32_t padded;                // 1: rows that are multiplied have at least 512 columns, zeros where there are none
    int32_t size;
};

// Memory that blocks exchange values through. A slot carries a value and the tag of the moment that it is for; each is
// written and read at once, so who sees the tag has the value. Bytes from the beginning of sync.
struct Exchange {
    int64_t hidden;     // {float, tag} [row][h]
    int64_t qkvg;       // {float, tag} [row][qkv + A]
    int64_t up;         // {pair of T, tag} [row][m / 2]
    int64_t attention;  // {float, float, pair of T, tag} [row][A / 2]: two outputs and their gates
    int64_t size;
};
constexpr int kEpoch = 0, kArrived = 1;  // words at the beginning of sync

struct Params {
    Layout layout;
    Memory memory;
    Exchange exchange;
    Constants places;
    int64_t constants, ends;             // where they begin in the packed weights
    int32_t inputs[kMatrices], biases[kMatrices];  // of a matrix: x in shared memory; among a layer's constants
    int32_t rows, integers;
    uint32_t int8_bits[kMatrices];       // if quantised: which bits of a layer say that a matrix is int8; attention's has parts
    int32_t norm, activation, position_rows, position_offset;
    float norm_epsilon, group_norm_epsilon, inverse_hidden, inverse_heads;
    int32_t splits, columns, sets;       // blocks that share a head, its columns that each has, threads of a column
    // To divide by: splits, columns, query heads of a key/value head, pairs that an item takes of a row.
    uint64_t by_splits, by_columns, by_sharing, by_taken, by_fours;  // and fours of inner values
    int32_t entries;                     // partial sums of an output: warps, or sets of threads
    int32_t slots;                       // in the ring, or rounds
    int32_t flight, flight_busy;         // pieces under way at most, while a block waits for others and else
    const uint8_t* packed;
    const void* embedding;
    const void* embedding_scales;        // of an embedding in int8 or int4
    int32_t embedding_format;            // dijiang_weight_format
    const void* position_embedding;
    const void *input_ids, *positions, *seq_lens;
    float* states[DIJIANG_STEP_MAX_LAYERS];
    int64_t state_row_stride, logits_row_stride;
    float* logits;
    uint8_t* sync;
};

struct Plan {
    Params params;   // but for pointers
    int32_t capacity;  // rows that the kernel is compiled for: 1, 2, 4 or 8
};

// A model that was checked, on a device, for that many rows (at least one).
dijiang_status make_plan(const dijiang_step_model&, int32_t rows, const dijiang_device&, Plan&);

// Of a dijiang_dtype and a capacity; instances/ has a file for each type.
template <int kDtype, int kCapacity> cudaError_t launch(const Plan&, cudaStream_t);
template <int kDtype, int kCapacity> cudaError_t launch_quantised(const Plan&, cudaStream_t);
cudaError_t launch(int32_t dtype, const Plan&, cudaStream_t);  // the one that the plan names

cudaError_t pack_layer(const Layout&, int32_t dtype, int32_t layer, const dijiang_step_layer&, uint8_t* packed, cudaStream_t);
// One of a quantised model's matrices: its format is what the layout says.
cudaError_t pack_quantised(const Layout&, int32_t layer, int32_t matrix, const void* values, const void* scales, uint8_t* packed,
                           cudaStream_t);
cudaError_t pack_ends(const Layout&, int32_t dtype, const dijiang_step_ends&, uint8_t* packed, cudaStream_t);

}  // namespace step
}  // namespace dijiang
