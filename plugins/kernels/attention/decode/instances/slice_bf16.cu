#include "attention/decode/slice.cuh"

namespace dijiang {
namespace decode {
SliceKernel slice_kernel_bf16(int32_t head_dim, bool many) {
    return slice_instance<__nv_bfloat16>(head_dim, many);
}
}  // namespace decode
}  // namespace dijiang
