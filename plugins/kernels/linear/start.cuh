// Enqueues a kernel of products, which may begin before the one ahead of it has ended.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace dijiang {
namespace linear {

// overlap: programmatic dependent launch.
template <typename Params>
cudaError_t start(void (*kernel)(Params), const Params& params, dim3 grid, int32_t threads, int32_t shared_memory,
                  bool overlap, cudaStream_t stream) {
    if (shared_memory > 48 * 1024) {
        const cudaError_t status =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_memory);
        if (status != cudaSuccess) return status;
    }
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared_memory);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = overlap ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace linear
}  // namespace dijiang
