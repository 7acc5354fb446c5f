// Products with quantised weights: what the C ABI hands to the kernels after every argument was checked.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "dijiang/linear.h"

namespace dijiang {
namespace quantized {

constexpr int32_t kTile = 8;    // output elements that a set of warps computes together: the n of an mma
constexpr int32_t kBlock = 32;  // elements of K that share a scale
constexpr int32_t kLoad = 512;  // bytes of a chunk's weights: 16 a lane
constexpr int32_t kSlot = kLoad + 64;  // of a chunk with its scales, at most
constexpr int32_t kAhead = 12;  // chunks of each warp in shared memory, one less of them under way
constexpr int32_t kMostThreads = 512;  // of a block; one of them has 128 registers a thread

constexpr int32_t kPitch = 128 + 8;  // floats of a row of sums of the kernel for many rows: no two in one bank

#ifdef __CUDACC__
#define DIJIANG_BOTH __host__ __device__
#else
#define DIJIANG_BOTH
#endif

// Elements of K, blocks and bytes of a chunk.
DIJIANG_BOTH constexpr int32_t chunk_elements(int32_t format) { return format == DIJIANG_INT4 ? 128 : 64; }
DIJIANG_BOTH constexpr int32_t chunk_bytes(int32_t format) { return kLoad + (format == DIJIANG_INT4 ? 64 : 32); }

// Bytes of a packed weight.
constexpr int64_t packed_bytes(int32_t format, int64_t width, int64_t inner) {
    return (width + kTile - 1) / kTile * ((inner + chunk_elements(format) - 1) / chunk_elements(format)) *
           chunk_bytes(format);
}

struct Term {
    int32_t format;
    int32_t chunks;  // of a tile
};

// How the blocks share the outputs. Block b works for the last output whose first_block is at most b.
struct OutputCut {
    int32_t first_block, blocks;
    int32_t term, terms;     // its first term, and how many it has
    int32_t rounds;          // how often a block has a tile for each of its sets of warps
    int32_t staged;          // elements of a row of the inputs in shared memory
    int32_t shared_input;    // 1: two terms with one input, which is there once
};

struct Params {
    dijiang_linear_call call;
    Term terms[DIJIANG_LINEAR_MAX_TERMS];
    OutputCut outputs[DIJIANG_LINEAR_MAX_OUTPUTS];
    int32_t warps_per_tile;  // that share K
    int32_t tiles_per_block;  // at a time
    int32_t rows_per_block;  // up to 16
    int32_t any_gated;       // 1: an output has DIJIANG_SWIGLU
    int32_t staged_offset;   // bytes of shared memory before the staged input: the ring of weights
    int32_t sums_offset;     // and before the warps' sums, twice
};

struct Launch {
    Params params;
    int32_t blocks, row_blocks, threads, shared_memory;
    bool many;  // the kernel for many rows
};

DIJIANG_BOTH constexpr int32_t format_of(const dijiang_linear_call& call, int32_t term) {
    return static_cast<int32_t>(call.weight_formats >> (8 * term) & 0xffu);
}

// Elements from one staged row to the next: eight neighbouring rows then lie in different banks.
DIJIANG_BOTH constexpr int32_t staged_pitch(int32_t elements) { return elements + 8; }

// Cuts a valid call of at least one row.
dijiang_status cut(const dijiang_linear_call&, const dijiang_device&, Launch&);
std::string describe(const Launch&);  // for people and tests

// Only enqueue. overlap: programmatic dependent launch.
cudaError_t launch_f16(const Launch&, bool overlap, cudaStream_t);
cudaError_t launch_bf16(const Launch&, bool overlap, cudaStream_t);

}  // namespace quantized
}  // namespace dijiang
