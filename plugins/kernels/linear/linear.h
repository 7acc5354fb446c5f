// Matrix products of few rows: what the C ABI hands to the kernels after every argument was checked.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "dijiang/linear.h"

namespace dijiang {
namespace linear {

constexpr int32_t kTile = 8;  // output elements that a set of warps computes together: the n of an mma
constexpr int32_t kChunk = DIJIANG_LINEAR_INNER_STEP;  // elements of K that one load of a warp covers
constexpr int32_t kAhead = 8;          // loads of weights that each thread has under way
constexpr int32_t kMostThreads = 512;  // of a block; two of them have 64 registers a thread

// How the blocks share the outputs. Block b works for the last output whose first_block is at most b.
struct OutputCut {
    int32_t first_block, blocks;
    int32_t term, terms;     // its first term, and how many it has
    int32_t warps_per_tile;  // that share K
    int32_t tiles_per_block;  // at a time
    int32_t rounds;           // how often
    int32_t staged;           // elements of a row of the inputs in shared memory
    int32_t shared_input;     // 1: two terms with one input, which is there once
};

struct Params {
    dijiang_linear_call call;
    OutputCut outputs[DIJIANG_LINEAR_MAX_OUTPUTS];
    int32_t rows_per_block;  // up to 16
    int32_t any_gated;       // 1: an output has DIJIANG_SWIGLU
    int32_t staged_offset;   // bytes of shared memory before the staged input: the ring of weights
    int32_t sums_offset;     // and before the warps' sums, twice
};

struct Launch {
    Params params;
    int32_t blocks, row_blocks, threads, shared_memory;
    float share;  // of the multiprocessors' time that is expected to be work
};

// Elements from one staged row to the next. Two neighbouring rows then lie in different banks.
#ifdef __CUDACC__
__host__ __device__
#endif
constexpr int32_t staged_pitch(int32_t elements) { return elements % (2 * kChunk) == 0 ? elements + kChunk : elements; }

// Cuts a valid call of at least one row.
dijiang_status cut(const dijiang_linear_call&, const dijiang_device&, Launch&);
std::string describe(const Launch&);  // for people and tests

// Only enqueue. overlap: programmatic dependent launch.
cudaError_t launch_f16(const Launch&, bool overlap, cudaStream_t);
cudaError_t launch_bf16(const Launch&, bool overlap, cudaStream_t);

}  // namespace linear
}  // namespace dijiang
