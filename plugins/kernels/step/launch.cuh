// Launches the step kernel for one type of weights.
#pragma once

#include "step/kernel.cuh"

namespace dijiang {
namespace step {

template <typename T> const void* kernel_for(int capacity) {
    switch (capacity) {
        case 1: return reinterpret_cast<const void*>(step_kernel<T, 1>);
        case 2: return reinterpret_cast<const void*>(step_kernel<T, 2>);
        case 4: return reinterpret_cast<const void*>(step_kernel<T, 4>);
        default: return reinterpret_cast<const void*>(step_kernel<T, 8>);
    }
}

// Cooperative: CUDA starts all blocks at once or says that it cannot.
template <typename T> cudaError_t launch(const Plan& plan, cudaStream_t stream) {
    const void* kernel = kernel_for<T>(plan.capacity);
    const int shared = plan.params.memory.size;
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) return error;
    void* arguments[] = {const_cast<Params*>(&plan.params)};
    return cudaLaunchCooperativeKernel(kernel, dim3(plan.params.layout.blocks), dim3(kThreads + 32), arguments,
                                       static_cast<size_t>(shared), stream);
}

}  // namespace step
}  // namespace dijiang
