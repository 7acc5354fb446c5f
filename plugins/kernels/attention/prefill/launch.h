// The kernels of prefill, one function per translation unit.
#pragma once

#include <atomic>

#include "attention/prefill/schedule.h"

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

// Lets `kernel` use as much shared memory as the device has, once per device.
class SharedMemoryGrant {
public:
    cudaError_t operator()(const void* kernel, size_t bytes) {
        if (bytes <= 48 * 1024) return cudaSuccess;
        int device = 0;
        const cudaError_t status = cudaGetDevice(&device);
        if (status != cudaSuccess) return status;
        const bool known = device < 64;
        if (known && done_.load(std::memory_order_acquire) >> device & 1) return cudaSuccess;
        int most = 0;
        cudaError_t set = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
        cudaFuncAttributes attributes{};
        if (set == cudaSuccess) set = cudaFuncGetAttributes(&attributes, kernel);
        const int room = most - static_cast<int>(attributes.sharedSizeBytes);
        if (set == cudaSuccess) set = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, room);
        if (set == cudaSuccess && known) done_.fetch_or(uint64_t{1} << device, std::memory_order_release);
        return set;
    }

private:
    std::atomic<uint64_t> done_{0};  // devices
};

}  // namespace dijiang::prefill
