#include "attention/prefill/hopper/kernel.cuh"

namespace dijiang::prefill {

cudaError_t launch_hopper_128_f16(const AttentionParams& p, const Schedule& schedule, cudaStream_t stream) {
    return hopper::launch_hopper<__half, 128>(p, schedule, stream);
}

}  // namespace dijiang::prefill
