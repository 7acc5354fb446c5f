#include "prefill/fused.cuh"

namespace dijiang::prefill {

cudaError_t launch_wide_256_f16(const AttentionParams& p, const Plan& plan, cudaStream_t stream) {
    const cudaError_t status = launch_wide_features<__half, 256>(p, plan, plan.multiprocessors, stream);
    return status == cudaSuccess ? launch_fused<__half, 256>(p, plan, stream) : status;
}

}  // namespace dijiang::prefill
