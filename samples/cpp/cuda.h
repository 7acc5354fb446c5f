// CUDA's runtime with errors as Failure, and memory that goes when its owner goes.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <string>
#include <utility>

#include "errors.h"

namespace dijiang {

inline void check(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    (void)cudaGetLastError();  // a failure that is not sticky shall not be met again by the next call
    throw Failure(std::string(what) + " failed: " + cudaGetErrorString(status),
                  status == cudaErrorMemoryAllocation
                      ? "the GPU has too little free memory: stop what else uses it, or "
                        "build the engine with a smaller --max-length"
                      : "");
}

class DeviceMemory {
public:
    DeviceMemory() = default;
    explicit DeviceMemory(size_t bytes) : bytes_(bytes) {
        if (bytes == 0) return;
        check(cudaMalloc(&data_, bytes), "allocating GPU memory");
        cudaError_t status = cudaMemset(data_, 0, bytes);
        if (status == cudaSuccess)
            status = cudaStreamSynchronize(nullptr);  // other streams do not wait for it
        if (status != cudaSuccess) cudaFree(data_);
        check(status, "clearing GPU memory");
    }
    DeviceMemory(DeviceMemory&& other) noexcept : data_(other.data_), bytes_(other.bytes_) {
        other.data_ = nullptr;
        other.bytes_ = 0;
    }
    DeviceMemory& operator=(DeviceMemory&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(bytes_, other.bytes_);
        return *this;
    }
    ~DeviceMemory() {
        if (data_ != nullptr) cudaFree(data_);
    }

    void* data() const { return data_; }
    size_t bytes() const { return bytes_; }
    template <typename T>
    T* as() const {
        return static_cast<T*>(data_);
    }

private:
    void* data_ = nullptr;
    size_t bytes_ = 0;
};

class Stream {
public:
    Stream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "making a stream"); }
    ~Stream() { cudaStreamDestroy(stream_); }
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;

    cudaStream_t get() const { return stream_; }
    void wait() const { check(cudaStreamSynchronize(stream_), "running on the GPU"); }

private:
    cudaStream_t stream_ = nullptr;
};

class Event {
public:
    Event() { check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "making an event"); }
    ~Event() { cudaEventDestroy(event_); }
    Event(const Event&) = delete;
    Event& operator=(const Event&) = delete;

    void record(const Stream& stream) const { check(cudaEventRecord(event_, stream.get()), "recording"); }
    void wait() const { check(cudaEventSynchronize(event_), "running on the GPU"); }

private:
    cudaEvent_t event_ = nullptr;
};

// Work that was captured from a stream once, to be launched again and again.
class Graph {
public:
    Graph() = default;
    ~Graph() {
        if (graph_ != nullptr) cudaGraphExecDestroy(graph_);
    }
    Graph(const Graph&) = delete;
    Graph& operator=(const Graph&) = delete;

    template <typename Work>
    void capture(const Stream& stream, Work&& work) {
        check(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeThreadLocal),
              "beginning a CUDA graph");
        cudaGraph_t made = nullptr;
        try {
            work();
        } catch (...) {
            cudaStreamEndCapture(stream.get(), &made);
            if (made != nullptr) cudaGraphDestroy(made);
            (void)cudaGetLastError();
            throw;
        }
        check(cudaStreamEndCapture(stream.get(), &made), "capturing a CUDA graph");
        const cudaError_t status = cudaGraphInstantiate(&graph_, made, 0);
        cudaGraphDestroy(made);
        check(status, "making a CUDA graph");
    }

    bool captured() const { return graph_ != nullptr; }
    void launch(const Stream& stream) const {
        check(cudaGraphLaunch(graph_, stream.get()), "launching a CUDA graph");
    }

private:
    cudaGraphExec_t graph_ = nullptr;
};

}  // namespace dijiang
