#include "attention/prefill/fused.cuh"

namespace dijiang::prefill {

cudaError_t launch_wide_256_bf16(const AttentionParams& p, const Schedule& schedule, cudaStream_t stream) {
    const cudaError_t status = launch_wide_features<__nv_bfloat16, 256>(p, schedule, schedule.multiprocessors, stream);
    return status == cudaSuccess ? launch_fused<__nv_bfloat16, 256>(p, schedule, stream) : status;
}

}  // namespace dijiang::prefill
