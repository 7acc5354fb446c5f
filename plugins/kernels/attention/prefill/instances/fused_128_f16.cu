#include "attention/prefill/fused.cuh"

namespace dijiang::prefill {

cudaError_t launch_fused_128_f16(const AttentionParams& p, const Schedule& schedule, cudaStream_t stream) {
    return launch_fused<__half, 128>(p, schedule, stream);
}

}  // namespace dijiang::prefill
