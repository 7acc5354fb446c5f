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
    int threads;       // of a block
    int team;          // blocks per row: 1, 2, 4, 8 or 16
    int per_warp;      // ids per warp, a multiple of 32
    int staging;       // where in a block's shared memory its scores are; 0: logits are read again in each pass
    int bytes;         // of a block's dynamic shared memory
    bool slim;         // filters of many tokens have no memory of their own: they take the scores' place
};

// What a launch's options ask for, as far as the cut depends on it.
struct SampleNeeds {
    bool greedy;    // no weights
    bool filters;   // top-k or top-p, or rows have options of their own
    int32_t top_k;  // of all rows; 0 if it keeps all, or if rows have options of their own
};

// Does a top-k keep few tokens, of a row with so many threads that each knows its best? About k + k^2 / (2 threads)
// tokens are better than the k-th best of these, if they lie in no order, and a bin's more.
DIJIANG_BOTH inline bool are_few(int32_t top_k, int threads) {
    constexpr int kMost = 160;
    return top_k > 0 && top_k <= kMost && top_k + top_k * top_k / threads <= kMost;
}

// How many rows can have teams at once whose blocks have a multiprocessor each: of 2, 4, 8 and 16 blocks.
struct SampleTeams {
    static constexpr int kSizes = 5;
    int rows[kSizes];  // by the size's logarithm; 0: no row can; the first does not count

    static SampleTeams guess(const dijiang_device&);  // of a device that cannot be asked
};
cudaError_t sample_teams(const dijiang_device&, SampleTeams&);  // the current device says

SampleCut cut_sample(int32_t batch, int32_t vocabulary, const dijiang_device&, const SampleTeams&, const SampleNeeds&);
// overlap: programmatic dependent launch.
cudaError_t launch_sample(const SampleParams&, const SampleCut&, const dijiang_device&, bool overlap, cudaStream_t);
cudaError_t launch_advance(const dijiang_advance_buffers&, cudaStream_t);  // strides are filled in

}  // namespace dijiang
