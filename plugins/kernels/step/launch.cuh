// Launches the step kernel of one type and capacity.
#pragma once

#include "step/kernel.cuh"

namespace dijiang {
namespace step {

template <int kDtype> struct Element { using type = __half; };
template <> struct Element<DIJIANG_BFLOAT16> { using type = __nv_bfloat16; };

// Cooperative: CUDA starts all blocks at once or says that it cannot.
inline cudaError_t launch_cooperatively(const void* kernel, const Plan& plan, cudaStream_t stream) {
    const int shared = plan.params.memory.size;
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) return error;
    void* arguments[] = {const_cast<Params*>(&plan.params)};
    return cudaLaunchCooperativeKernel(kernel, dim3(plan.params.layout.blocks), dim3(kThreads + 32), arguments,
                                       static_cast<size_t>(shared), stream);
}

template <int kDtype, int kCapacity> cudaError_t launch(const Plan& plan, cudaStream_t stream) {
    using T = typename Element<kDtype>::type;
    const void* const kernel = plan.params.layout.parallel ? reinterpret_cast<const void*>(step_kernel<T, kCapacity, true>)
                                                           : reinterpret_cast<const void*>(step_kernel<T, kCapacity, false>);
    return launch_cooperatively(kernel, plan, stream);
}

}  // namespace step
}  // namespace dijiang
