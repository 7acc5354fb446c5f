// What the C ABI hands to the sampling kernels, after every argument was checked.
#pragma once

#include <cuda_runtime_api.h>

#include <cmath>

#include "dijiang/sampling.h"

namespace dijiang {

// What follows from options in double precision, which is slow on most GPUs.
struct SampleNumbers {
    float rate;             // of softmax: log2(e) / temperature
    uint64_t least_weight;  // that min-p keeps
};

struct SampleParams {
    dijiang_sampling_options options;
    SampleNumbers numbers;           // of `options`
    dijiang_sample_buffers buffers;  // strides are filled in
    bool options_per_row;
};

#ifdef __CUDACC__
#define DIJIANG_BOTH __host__ __device__
#else
#define DIJIANG_BOTH
#endif

// The weight of the most likely token is 2^weight_bits: a whole vocabulary's stays below 2^63.
DIJIANG_BOTH inline int weight_bits(int32_t vocabulary) {
#ifdef __CUDA_ARCH__
    return 30 + __clz(vocabulary - 1);
#else
    int bits = 62;
    for (int32_t rest = vocabulary - 1; rest > 0; rest /= 2) --bits;
    return bits;
#endif
}

// The rate is within float32's normal range even for absurd temperatures: 0 and -inf times it are 0 and -inf.
DIJIANG_BOTH inline SampleNumbers numbers_of(const dijiang_sampling_options& options, int32_t vocabulary) {
    constexpr double kLog2e = 1.4426950408889634;
    constexpr double kLeast = 1.17549435e-38, kMost = 3.40282347e+38;  // float32's normal numbers
    const double rate = kLog2e / options.temperature;
    const double least = ceil(options.min_p * static_cast<double>(uint64_t{1} << weight_bits(vocabulary)));
    return {static_cast<float>(rate < kLeast ? kLeast : rate > kMost ? kMost : rate),
            least > 1 ? static_cast<uint64_t>(least) : 1};
}

// How the rows are cut.
struct SampleCut {
    int team;          // blocks per row: 1, 2, 4, 8 or 16
    int per_warp;      // ids per warp, a multiple of 32
    int staged_bytes;  // of a block's dynamic shared memory; 0: the logits are read again in each pass
};

// How many rows can have sixteen blocks at once, which the GPU itself must say; 0 where none can.
cudaError_t large_clusters(const dijiang_device&, int& count);
SampleCut cut_sample(int32_t batch, int32_t vocabulary, const dijiang_device&, int large_clusters, bool greedy);
// overlap: programmatic dependent launch.
cudaError_t launch_sample(const SampleParams&, const SampleCut&, const dijiang_device&, bool overlap, cudaStream_t);
cudaError_t launch_advance(const dijiang_advance_buffers&, cudaStream_t);  // strides are filled in

}  // namespace dijiang
