// Decode of many states in two launches: the features of all heads first, on tensor cores, then a block for each head
// whose state streams past. What one launch would do between two pieces of a state is then done for all at once.
#pragma once

#include "attention/decode/cut.h"

namespace dijiang {
namespace decode {

// The first launch. A vector is a head of q or of k; those of a row lie side by side in qkv.
struct FeatureCut {
    int32_t vectors, vectors_per_row;
};
// The second launch: a block has some heads of a row, whose channels GroupNorm's groups do not leave, or some columns
// of one head.
struct StateCut {
    int32_t splits, set_heads, sets;  // parts of a head; heads of a block; blocks of a row without the splits
    int32_t sharing;                  // query heads of a key/value head
    int32_t vectors_per_row;
    float inverse_channels;  // 1 / H
};

// The two kernels of an element type and a head size. Null if there are none.
struct BatchKernels {
    const void *features = nullptr, *states = nullptr;
    int32_t vectors = 0, feature_threads = 0, feature_memory = 0;  // of a block of the first
    int32_t slices = 0;                                            // blocks that share a vector
    int32_t width = 0;                                             // columns of a block of the second
    int32_t head_threads = 0, head_memory = 0, most_heads = 0;     // of each of its heads; of the block
    int64_t least_bytes = 0;  // of states a multiprocessor, from where two launches were faster than one on an H100
};
BatchKernels batch_kernels_f16(int32_t head_dim);
BatchKernels batch_kernels_bf16(int32_t head_dim);

// A whole step of a geometry and a batch, if it is done so.
struct BatchPlan {
    BatchKernels kernels;  // null: it is not
    FeatureCut features;
    StateCut states;
    int32_t feature_blocks, state_blocks, state_threads, state_memory;
    int64_t workspace;  // bytes of the features: float32 [vectors, d], and [vectors, slices, 2] if there are several
};
BatchPlan plan_batch(const dijiang_geometry&, int32_t batch, const dijiang_device&);
cudaError_t launch_batch(const BatchPlan&, const AttentionParams&, bool overlap, cudaStream_t);

}  // namespace decode
}  // namespace dijiang
