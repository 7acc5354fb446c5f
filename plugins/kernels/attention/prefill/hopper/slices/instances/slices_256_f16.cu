#include "attention/prefill/hopper/slices/kernel.cuh"

namespace dijiang::prefill {

cudaError_t launch_slices_256_f16(const AttentionParams& p, const Schedule& schedule, cudaStream_t stream) {
    return hopper::slices::launch_slices<__half, 256>(p, schedule, stream);
}

}  // namespace dijiang::prefill
