// Starts the kernels of products with quantised weights.
#pragma once

#include "linear/quantized/few.cuh"
#include "linear/quantized/many.cuh"

namespace dijiang {
namespace quantized {

template <typename T> cudaError_t launch(const Launch& launch, bool overlap, cudaStream_t stream) {
    void (*const kernel)(Params) = launch.many                        ? (launch.params.rows_per_block > 64 ? many_kernel<T, 4> : many_kernel<T, 2>)
                                   : launch.params.rows_per_block > 8 ? few_kernel<T, true>
                                                                      : few_kernel<T, false>;
    if (launch.shared_memory > 48 * 1024) {
        const cudaError_t status =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, launch.shared_memory);
        if (status != cudaSuccess) return status;
    }
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = launch.many ? dim3(static_cast<unsigned>(launch.row_blocks), static_cast<unsigned>(launch.blocks))
                                 : dim3(static_cast<unsigned>(launch.blocks), static_cast<unsigned>(launch.row_blocks));
    config.blockDim = dim3(static_cast<unsigned>(launch.threads));
    config.dynamicSmemBytes = static_cast<size_t>(launch.shared_memory);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = overlap ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, launch.params);
}

}  // namespace quantized
}  // namespace dijiang
