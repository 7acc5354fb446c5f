// Starts the kernels of products with quantised weights.
#pragma once

#include "host/launch.h"
#include "linear/quantized/kernels.cuh"

namespace dijiang {
namespace quantized {

template <typename T> cudaError_t launch(const Launch& launch, bool overlap, cudaStream_t stream) {
    const LaunchShape shape = {grid_of(launch), launch.threads, static_cast<size_t>(launch.shared_memory), 1, overlap};
    return launch_kernel(kernel_of<T>(launch), shape, stream, launch.params);
}

}  // namespace quantized
}  // namespace dijiang
