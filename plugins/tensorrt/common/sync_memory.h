// The small memory through which the blocks of one call meet (dijiang/kernels.h, `sync`).
#pragma once

#include <cstddef>
#include <string>

namespace dijiang::trt {

// Device memory that was zeroed once. Calls that may overlap need one each, so every execution context's
// plugin has its own: a copy starts empty.
class SyncMemory {
public:
    SyncMemory() = default;
    SyncMemory(const SyncMemory&) noexcept {}
    SyncMemory& operator=(const SyncMemory&) = delete;
    ~SyncMemory() { release(); }

    // At least `bytes` zeroed bytes on the current device; waits until they are. "" or what went wrong. Not
    // for enqueue: it allocates. Also safe while some thread captures a CUDA graph.
    std::string reserve(size_t bytes);
    void release() noexcept;

    void* data() const { return data_; }
    size_t size() const { return size_; }

private:
    void* data_ = nullptr;
    size_t size_ = 0;
};

}  // namespace dijiang::trt
