#include "step/launch.cuh"

namespace dijiang::step {

cudaError_t launch_f16(const Plan& plan, cudaStream_t stream) { return launch<__half>(plan, stream); }

}  // namespace dijiang::step
