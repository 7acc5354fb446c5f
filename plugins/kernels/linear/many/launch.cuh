// Starts the kernels around cuBLASLt's products.
#pragma once

#include "linear/many/parts.cuh"
#include "linear/start.cuh"

namespace dijiang {
namespace many {

template <typename T> cudaError_t widen(const Widen& it, bool overlap, cudaStream_t stream) {
    return linear::start(widen_kernel<T>, it, grid_of(it), kThreads, 0, overlap, stream);
}
template <typename T> cudaError_t normalise(const Normalise& it, bool overlap, cudaStream_t stream) {
    return linear::start(normalise_kernel<T>, it, grid_of(it), kThreads, 0, overlap, stream);
}
template <typename T> cudaError_t finish(const Finish& it, bool overlap, cudaStream_t stream) {
    return linear::start(finish_of<T>(it.activation), it, grid_of(it), kThreads, 0, overlap, stream);
}

}  // namespace many
}  // namespace dijiang
