#include "linear/many/launch.cuh"

namespace dijiang::many {

template cudaError_t widen<__nv_bfloat16>(const Widen&, bool, cudaStream_t);
template cudaError_t normalise<__nv_bfloat16>(const Normalise&, bool, cudaStream_t);
template cudaError_t finish<__nv_bfloat16>(const Finish&, bool, cudaStream_t);

}  // namespace dijiang::many
