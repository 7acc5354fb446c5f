#include "attention/prefill/hopper/kernel.cuh"

namespace dijiang::prefill {

cudaError_t launch_hopper_64_f16(const AttentionParams& p, const Schedule& schedule, cudaStream_t stream) {
    return hopper::launch_hopper<__half, 64>(p, schedule, stream);
}

}  // namespace dijiang::prefill
