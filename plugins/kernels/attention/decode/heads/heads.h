// Decode in one launch of a block for each head, or of a cluster for each large head: what is common to the host and
// the kernel.
#pragma once

#include "attention/decode/cut.h"

namespace dijiang {
namespace decode {

// A block has some heads of a row, whose channels GroupNorm's groups do not leave, or some columns of one head.
struct HeadCut {
    int32_t set_heads, sets;  // heads of a block; blocks, or clusters, of a row
    int32_t sharing;          // query heads of a key/value head
    float inverse_channels;   // 1 / H
};

// The kernel of an element type and a head size. Null if there is none.
struct HeadKernel {
    const void* function = nullptr;
    int32_t splits = 0;                                         // blocks of a head, a cluster
    int32_t head_threads = 0, head_memory = 0, most_heads = 0;  // of each of a block's heads; of the block
    int32_t blocks = 0;                                         // of one head, that a multiprocessor's registers let in
};
HeadKernel head_kernel_f16(int32_t head_dim);
HeadKernel head_kernel_bf16(int32_t head_dim);

// A whole step of a geometry and a batch, if it is done so.
struct HeadPlan {
    HeadKernel kernel;  // null: it is not
    HeadCut cut;
    int32_t blocks, threads;
    int32_t memory;         // of a block, bytes
    int32_t spread_memory;  // the same, or more, with which no multiprocessor takes more blocks than its share
};
HeadPlan plan_heads(const dijiang_geometry&, int32_t batch, const dijiang_device&);
cudaError_t launch_heads(const HeadPlan&, const AttentionParams&, const dijiang_device&, bool overlap, cudaStream_t);

}  // namespace decode
}  // namespace dijiang
