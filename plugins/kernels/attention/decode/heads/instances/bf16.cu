#include "attention/decode/heads/kernel.cuh"

namespace dijiang {
namespace decode {
HeadKernel head_kernel_bf16(int32_t head_dim) { return head_kernel<__nv_bfloat16>(head_dim); }
}  // namespace decode
}  // namespace dijiang
