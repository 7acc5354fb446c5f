#include "linear/quantized/launch.cuh"

namespace dijiang::quantized {

cudaError_t launch_f16(const Launch& it, bool overlap, cudaStream_t stream) { return launch<__half>(it, overlap, stream); }

}  // namespace dijiang::quantized
