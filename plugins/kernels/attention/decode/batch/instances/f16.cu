#include "attention/decode/batch/kernels.cuh"

namespace dijiang {
namespace decode {
BatchKernels batch_kernels_f16(int32_t head_dim) { return batch_kernels<__half>(head_dim); }
}  // namespace decode
}  // namespace dijiang
