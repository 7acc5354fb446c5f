// How decode cuts its work: shared by the host code and the launchers of the kernels.
#pragma once

#include "attention/attention.h"

namespace dijiang {
namespace decode {

// Who normalises a GroupNorm group.
enum class Norm : int32_t {
    block,    // it lies inside one block's channels
    cluster,  // blocks of a cluster exchange their raw outputs
    memory    // blocks meet in the workspace; the last one normalises the head set
};

// Consecutive heads that no GroupNorm group leaves: H / gcd(d, H).
int32_t set_heads(int32_t num_heads, int32_t head_dim);

// Division by n without dividing: exact for x with x * n < 2^32.
struct Divisor {
    uint32_t magic;  // floor(2^32 / n) + 1; 0 if n = 1

#ifdef __CUDACC__
    __device__ int quotient(int x) const { return magic == 0 ? x : static_cast<int>(__umulhi(x, magic)); }
#endif
};
inline Divisor divisor(int32_t n) {
    return {n == 1 ? 0u : static_cast<uint32_t>((uint64_t{1} << 32) / n + 1)};
}

// The slice kernel: a cluster serves `heads` heads, each by `splits` blocks that own some columns each.
struct SliceCut {
    int32_t splits, heads, set_heads;
    Norm norm;
    int32_t items;           // clusters' worth of work
    Divisor items_per_row;   // H / heads; for the few that run at once, not for all items
    Divisor sharing;         // query heads of a key/value head
    Divisor channels;        // H, the channels of a group
    float inverse_channels;  // 1 / H
};

// The stream kernel: a block serves one head, or one of `splits` parts of its columns.
struct StreamCut {
    int32_t splits, set_heads;
    Norm norm;         // block or memory
    int32_t items;     // blocks' worth of work
    int32_t resident;  // P is kept in shared memory
};

// One instance of the slice kernel: an element type, a head size, a number of columns. Null if there is none.
struct SliceKernel {
    const void* function = nullptr;
    int32_t width = 0, threads = 0, blocks_per_sm = 0;  // a block's columns and threads
    int32_t shared_memory = 0;      // a block's bytes, those that are asked for at the launch
    int32_t all_shared_memory = 0;  // all of a block's bytes
};
SliceKernel slice_kernel_f32(int32_t head_dim, bool many);
SliceKernel slice_kernel_f16(int32_t head_dim, bool many);
SliceKernel slice_kernel_bf16(int32_t head_dim, bool many);

constexpr int32_t kStreamThreads = 256;
constexpr int32_t kStreamBlocksPerSm = 2;
constexpr int32_t kStreamStaticMemory = 13 * 1024;  // bytes of a block beside the dynamic ones, rounded up
const void* stream_kernel(int32_t dtype);
int32_t stream_shared_memory(int32_t dtype, int32_t head_dim, bool resident);

// A kernel, its share of each multiprocessor, and the work there is.
struct Work {
    const void* function;
    int32_t cluster, threads, blocks_per_sm, shared_memory, items;
};
SliceCut cut_slices(const dijiang_geometry&, int32_t batch, const SliceKernel&);
StreamCut cut_stream(const dijiang_geometry&, int32_t batch, const dijiang_device&);

// Prepares a kernel for the current device, once, and says how many of its clusters run there at once.
cudaError_t prepare(const Work&, const dijiang_device&, int32_t& clusters);

// Enqueues as many clusters as fit the GPU, or as there are items. `overlap`: programmatic dependent launch.
cudaError_t enqueue(const Work&, const AttentionParams&, const void* cut, const dijiang_device&, bool overlap,
                    cudaStream_t);

}  // namespace decode
}  // namespace dijiang
