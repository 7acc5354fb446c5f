// Launching kernels: more shared memory than CUDA grants unasked, clusters, programmatic dependent launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace dijiang {

// Lets a kernel use as much dynamic shared memory as the current device has for it, if it uses any: unasked, CUDA grants
// 48 KB of it together with the static memory. CUDA is asked once for each kernel and device.
cudaError_t allow_shared_memory(const void* kernel, size_t bytes);

struct LaunchShape {
    dim3 grid;
    int32_t threads;       // of a block
    size_t shared_memory;  // of a block, dynamic, bytes
    int32_t cluster;       // blocks
    bool overlap;          // programmatic dependent launch
};

// Enqueues a kernel, whose parameters `arguments` points to.
cudaError_t launch_kernel(const void* kernel, const LaunchShape&, void** arguments, cudaStream_t);

// The same of a kernel whose parameters are known.
template <typename T> struct ParameterOf {
    using type = T;
};
template <typename... Parameters>
cudaError_t launch_kernel(void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t stream,
                          const typename ParameterOf<Parameters>::type&... arguments) {
    void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
    return launch_kernel(reinterpret_cast<const void*>(kernel), shape, pointers, stream);
}

}  // namespace dijiang
