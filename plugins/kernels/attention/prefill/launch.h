// The kernels of prefill, one function per translation unit.
#pragma once

#include "attention/prefill/schedule.h"
#include "host/launch.h"

namespace dijiang::prefill {

cudaError_t launch_generic(int32_t dtype, const AttentionParams&, const Schedule&, cudaStream_t);
cudaError_t launch_norm(int32_t dtype, const AttentionParams&, const float* raw, cudaStream_t);

// The fused kernel for float16 (f16) or bfloat16 (bf16) and heads of up to that size.
cudaError_t launch_fused_64_f16(const AttentionParams&, const Schedule&, cudaStream_t);
cudaError_t launch_fused_80_f16(const AttentionParams&, const Schedule&, cudaStream_t);
cudaError_t launch_fused_128_f16(const AttentionParams&, const Schedule&, cudaStream_t);
cudaError_t launch_fused_64_bf16(const AttentionParams&, const Schedule&, cudaStream_t);
cudaError_t launch_fused_80_bf16(const AttentionParams&, const Schedule&, cudaStream_t);
cudaError_t launch_fused_128_bf16(const AttentionParams&, const Schedule&, cudaStream_t);
// Heads of 129 to 256.
cudaError_t launch_wide_256_f16(const AttentionParams&, const Schedule&, cudaStream_t);
cudaError_t launch_wide_256_bf16(const AttentionParams&, const Schedule&, cudaStream_t);

// The same for compute capability 9.0 alone, geometric decay and heads of exactly that size.
cudaError_t launch_spans_64_f16(const AttentionParams&, const Schedule&, cudaStream_t);
cudaError_t launch_spans_64_bf16(const AttentionParams&, const Schedule&, cudaStream_t);
cudaError_t launch_slices_256_f16(const AttentionParams&, const Schedule&, cudaStream_t);
cudaError_t launch_slices_256_bf16(const AttentionParams&, const Schedule&, cudaStream_t);
cudaError_t launch_hopper_80_f16(const AttentionParams&, const Schedule&, cudaStream_t);
cudaError_t launch_hopper_128_f16(const AttentionParams&, const Schedule&, cudaStream_t);
cudaError_t launch_hopper_80_bf16(const AttentionParams&, const Schedule&, cudaStream_t);
cudaError_t launch_hopper_128_bf16(const AttentionParams&, const Schedule&, cudaStream_t);

}  // namespace dijiang::prefill
