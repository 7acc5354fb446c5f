// Starts the kernels of products with quantised weights.
#pragma once

#include "linear/quantized/kernels.cuh"
#include "linear/start.cuh"

namespace dijiang {
namespace quantized {

template <typename T> cudaError_t launch(const Launch& launch, bool overlap, cudaStream_t stream) {
    return linear::start(kernel_of<T>(launch), launch.params, grid_of(launch), launch.threads, launch.shared_memory,
                         overlap, stream);
}

}  // namespace quantized
}  // namespace dijiang
