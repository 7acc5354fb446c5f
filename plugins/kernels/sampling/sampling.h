// What the C ABI hands to the sampling kernels, after every argument was checked.
#pragma once

#include <cuda_runtime_api.h>

#include "dijiang/sampling.h"

namespace dijiang {

struct SampleParams {
    dijiang_sampling_options options;
    dijiang_sample_buffers buffers;  // strides are filled in
    bool options_per_row;
};

// How the rows are cut.
struct SampleCut {
    int team;          // blocks per row
    int per_warp;      // ids per warp, a multiple of 32
    int staged_bytes;  // of a block's dynamic shared memory; 0: the logits are read again in each pass
};

SampleCut cut_sample(int32_t batch, int32_t vocabulary, const dijiang_device&, bool greedy);
// overlap: programmatic dependent launch.
cudaError_t launch_sample(const SampleParams&, const SampleCut&, const dijiang_device&, bool overlap, cudaStream_t);
cudaError_t launch_advance(const dijiang_advance_buffers&, cudaStream_t);  // strides are filled in

}  // namespace dijiang
