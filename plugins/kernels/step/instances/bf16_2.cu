#include "step/launch.cuh"

namespace dijiang::step {

template cudaError_t launch<DIJIANG_BFLOAT16, 2>(const Plan&, cudaStream_t);

}  // namespace dijiang::step
