#include "linear/many/launch.cuh"

namespace dijiang::many {

template cudaError_t widen<__half>(const Widen&, bool, cudaStream_t);
template cudaError_t normalise<__half>(const Normalise&, bool, cudaStream_t);
template cudaError_t finish<__half>(const Finish&, bool, cudaStream_t);

}  // namespace dijiang::many
