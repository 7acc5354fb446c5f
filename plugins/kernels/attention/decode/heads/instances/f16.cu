#include "attention/decode/heads/kernel.cuh"

namespace dijiang {
namespace decode {
HeadKernel head_kernel_f16(int32_t head_dim) { return head_kernel<__half>(head_dim); }
}  // namespace decode
}  // namespace dijiang
