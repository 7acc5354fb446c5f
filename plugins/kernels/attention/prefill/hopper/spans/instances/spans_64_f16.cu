#include "attention/prefill/hopper/spans/kernel.cuh"

namespace dijiang::prefill {

cudaError_t launch_spans_64_f16(const AttentionParams& p, const Schedule& schedule, cudaStream_t stream) {
    return hopper::spans::launch_spans<__half, 64>(p, schedule, stream);
}

}  // namespace dijiang::prefill
