#include "attention/decode/slice.cuh"

namespace dijiang {
namespace decode {
SliceKernel slice_kernel_f32(int32_t head_dim, bool many) { return slice_instance<float>(head_dim, many); }
}  // namespace decode
}  // namespace dijiang
