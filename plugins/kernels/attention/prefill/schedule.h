// How a prefill call is cut into blocks: host arithmetic alone, so that it can be tested without a GPU.
#pragma once

#include "attention/attention.h"

namespace dijiang::prefill {

enum class Path {
    generic,  // float32 arithmetic, any size: features, scan, norm
    fused,    // tensor cores, d = 64, 80, 128: one kernel (and norm, if a block does not own whole groups)
    wide,     // tensor cores, d = 256: features first, then the same kernel over blocks of 64 value columns
    hopper,   // compute capability 9.0, geometric decay, d = 80, 128: products of four warps
    spans,    // the same for d = 64, four chunks at a time
    slices    // the same for d = 256: features first, then states in slices of 64 value columns
};

struct Schedule {
    Path path;
    int set;             // heads per block (fused)
    int stages;          // of features and scores (fused, wide)
    int multiprocessors;
    bool overlap;        // may begin before the kernel ahead of it has ended (hopper, spans, slices)
    bool raw;            // outputs go through the workspace in float32 and are normalised by a last kernel
    int segments;        // pieces of the sequence that run at the same time
    int segment_chunks;  // chunks of 64 tokens per piece
    int blocks, threads; // of the main kernel
    int feature_blocks;  // of the kernel before it (slices)
    size_t shared;       // bytes of shared memory per block of the main kernel
    // Byte offsets into the workspace, then its size and that of the sync memory.
    size_t features, states, outputs, workspace, sync;
};

constexpr int kChunk = 64;

// Path::slices: of how many blocks, each with a slice of a head, a cluster is: 2 or 4. With 4 features come from the L2
// cache once a head, not twice, but 132 multiprocessors, which lie in groups of up to 18, may not hold 32 such clusters.
constexpr int kSliceCluster = 2;

Schedule make_schedule(const dijiang_geometry& geometry, int batch, int length, const dijiang_device& device);

}  // namespace dijiang::prefill
