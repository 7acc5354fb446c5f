#include "attention/prefill/hopper/spans/kernel.cuh"

namespace dijiang::prefill {

cudaError_t launch_spans_64_bf16(const AttentionParams& p, const Schedule& schedule, cudaStream_t stream) {
    return hopper::spans::launch_spans<__nv_bfloat16, 64>(p, schedule, stream);
}

}  // namespace dijiang::prefill
