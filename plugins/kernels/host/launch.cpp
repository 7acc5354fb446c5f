#include "host/launch.h"

#include <mutex>
#include <set>
#include <utility>

namespace dijiang {

cudaError_t allow_shared_memory(const void* kernel, size_t bytes) {
    static std::mutex mutex;
    static std::set<std::pair<int, const void*>> allowed;
    if (bytes == 0) return cudaSuccess;
    int device = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status != cudaSuccess) return status;
    const std::lock_guard<std::mutex> lock(mutex);
    if (allowed.count({device, kernel}) != 0) return cudaSuccess;
    int most = 0;
    cudaFuncAttributes attributes{};
    status = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (status == cudaSuccess) status = cudaFuncGetAttributes(&attributes, kernel);
    const int room = most - static_cast<int>(attributes.sharedSizeBytes);
    if (status == cudaSuccess)
        status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, room);
    if (status == cudaSuccess) allowed.insert({device, kernel});
    return status;
}

cudaError_t launch_kernel(const void* kernel, const LaunchShape& shape, void** arguments, cudaStream_t stream) {
    const cudaError_t status = allow_shared_memory(kernel, shape.shared_memory);
    if (status != cudaSuccess) return status;
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config = {};
    config.gridDim = shape.grid;
    config.blockDim = dim3(static_cast<unsigned>(shape.threads));
    config.dynamicSmemBytes = shape.shared_memory;
    config.stream = stream;
    config.attrs = attributes;
    if (shape.cluster > 1) {
        attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
    }
    if (shape.overlap) {
        attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    return cudaLaunchKernelExC(&config, kernel, arguments);
}

}  // namespace dijiang
