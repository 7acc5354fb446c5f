#include "linear/quantized/launch.cuh"

namespace dijiang::quantized {

cudaError_t launch_bf16(const Launch& it, bool overlap, cudaStream_t stream) { return launch<__nv_bfloat16>(it, overlap, stream); }

}  // namespace dijiang::quantized
