#include "step/launch.cuh"

namespace dijiang::step {

template cudaError_t launch<DIJIANG_FLOAT16, 4>(const Plan&, cudaStream_t);

}  // namespace dijiang::step
