#include "attention/prefill/hopper/kernel.cuh"

namespace dijiang::prefill {

cudaError_t launch_hopper_80_bf16(const AttentionParams& p, const Schedule& schedule, cudaStream_t stream) {
    return hopper::launch_hopper<__nv_bfloat16, 80>(p, schedule, stream);
}

}  // namespace dijiang::prefill
