#include "common/sync_memory.h"

#include <cuda_runtime_api.h>

#include "host/outside_capture.h"

namespace dijiang::trt {
namespace {

// Zeroes on a stream of its own: the default stream would wait for, and hold up, unrelated work.
cudaError_t zero(void* data, size_t bytes) {
    cudaStream_t stream = nullptr;
    cudaError_t error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    if (error != cudaSuccess) return error;
    error = cudaMemsetAsync(data, 0, bytes, stream);
    if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
    cudaStreamDestroy(stream);
    return error;
}

}  // namespace

std::string SyncMemory::reserve(size_t bytes) {
    if (bytes <= size_) return {};
    const OutsideCapture outside;
    void* fresh = nullptr;
    cudaError_t error = cudaMalloc(&fresh, bytes);
    if (error == cudaSuccess) error = zero(fresh, bytes);
    if (error != cudaSuccess) {
        cudaFree(fresh);
        cudaGetLastError();
        return "cannot allocate " + std::to_string(bytes) +
               " bytes of sync memory: " + cudaGetErrorString(error);
    }
    release();  // cudaFree waits for calls that still use the old memory
    data_ = fresh;
    size_ = bytes;
    return {};
}

void SyncMemory::release() noexcept {
    if (data_ == nullptr) return;
    const OutsideCapture outside;
    // Fails at process exit, after the CUDA runtime has gone and taken the memory with it.
    if (cudaFree(data_) != cudaSuccess) cudaGetLastError();
    data_ = nullptr;
    size_ = 0;
}

}  // namespace dijiang::trt
