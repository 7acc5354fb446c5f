#include "step/quantised/launch.cuh"

namespace dijiang::step {

template cudaError_t launch_quantised<DIJIANG_FLOAT16, 1>(const Plan&, cudaStream_t);
template cudaError_t launch_quantised<DIJIANG_FLOAT16, 2>(const Plan&, cudaStream_t);
template cudaError_t launch_quantised<DIJIANG_FLOAT16, 4>(const Plan&, cudaStream_t);
template cudaError_t launch_quantised<DIJIANG_FLOAT16, 8>(const Plan&, cudaStream_t);

}  // namespace dijiang::step
