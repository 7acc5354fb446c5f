#include "prefill/fused.cuh"

namespace dijiang::prefill {

cudaError_t launch_fused_64_f16(const AttentionParams& p, const Plan& plan, cudaStream_t stream) {
    return launch_fused<__half, 64>(p, plan, stream);
}

}  // namespace dijiang::prefill
