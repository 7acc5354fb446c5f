// Starts the kernels around cuBLASLt's products.
#pragma once

#include "host/launch.h"
#include "linear/many/parts.cuh"

namespace dijiang {
namespace many {

template <typename T> cudaError_t widen(const Widen& it, bool overlap, cudaStream_t stream) {
    return launch_kernel(widen_kernel<T>, {grid_of(it), kThreads, 0, 1, overlap}, stream, it);
}
template <typename T> cudaError_t normalise(const Normalise& it, bool overlap, cudaStream_t stream) {
    return launch_kernel(normalise_kernel<T>, {grid_of(it), kThreads, 0, 1, overlap}, stream, it);
}
template <typename T> cudaError_t finish(const Finish& it, bool overlap, cudaStream_t stream) {
    return launch_kernel(finish_of<T>(it.activation), {grid_of(it), kThreads, 0, 1, overlap}, stream, it);
}

}  // namespace many
}  // namespace dijiang
