#include "attention/prefill/fused.cuh"

namespace dijiang::prefill {

cudaError_t launch_fused_80_bf16(const AttentionParams& p, const Schedule& schedule, cudaStream_t stream) {
    return launch_fused<__nv_bfloat16, 80>(p, schedule, stream);
}

}  // namespace dijiang::prefill
