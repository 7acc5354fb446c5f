#include "attention/decode/batch/kernels.cuh"

namespace dijiang {
namespace decode {
BatchKernels batch_kernels_bf16(int32_t head_dim) { return batch_kernels<__nv_bfloat16>(head_dim); }
}  // namespace decode
}  // namespace dijiang
