// The kernels around cuBLASLt's products of many rows: what the host hands to them.
#pragma once

#include <cuda_runtime_api.h>

#include "linear/many/plan.h"

namespace dijiang {
namespace many {

constexpr int32_t kThreads = 256;  // of a block

// Some tiles of a quantised weight, made T [rows, inner].
struct WidenJob {
    const unsigned char* from;  // the first tile
    void* to;
    int32_t format, rows, inner, chunks;  // rows: of `to`; chunks: of a tile
    int32_t first_block;                  // of the blocks of all jobs, in order
};
// A bias of T's numbers, made T.
struct BiasJob {
    const float* from;
    void* to;
    int32_t width, first_block;  // of the blocks behind those of weights
};
struct Widen {
    WidenJob jobs[kMostJobs];
    BiasJob biases[DIJIANG_LINEAR_MAX_OUTPUTS];
    int32_t count, blocks;  // of weights
    int32_t bias_count, bias_blocks;
};

// Rows of a norm's input.
struct Normalise {
    dijiang_linear_output output;  // the norm
    const void* from;              // T [rows, inner]
    void* to;
    int32_t rows, inner;
};

// Sums become an output: [rows, columns] of one `width` wide.
struct Finish {
    const float *sums, *second;  // second: of DIJIANG_SWIGLU
    const float *bias, *second_bias;  // of the columns, or null; without DIJIANG_SWIGLU both are added
    const void* residual;             // of the first element, like `to`; or null
    void* to;
    int32_t rows, columns, width, activation;
    int64_t stride;  // elements from one row of sums to the next
};

// Only enqueue. overlap: programmatic dependent launch.
template <typename T> cudaError_t widen(const Widen&, bool overlap, cudaStream_t);
template <typename T> cudaError_t normalise(const Normalise&, bool overlap, cudaStream_t);
template <typename T> cudaError_t finish(const Finish&, bool overlap, cudaStream_t);

constexpr int32_t kWarps = kThreads / 32;
constexpr int32_t kFinishRows = 32, kFinishColumns = 256;  // of a block

inline int32_t bias_blocks(int32_t width) { return (width + kThreads - 1) / kThreads; }
inline int32_t widen_blocks(int32_t rows, int32_t chunks) { return ((rows + 7) / 8 * chunks + kWarps - 1) / kWarps; }

}  // namespace many
}  // namespace dijiang
