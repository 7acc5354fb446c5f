#include "step/launch.cuh"

namespace dijiang::step {

cudaError_t launch_bf16(const Plan& plan, cudaStream_t stream) { return launch<__nv_bfloat16>(plan, stream); }

}  // namespace dijiang::step
