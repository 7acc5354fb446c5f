// What the programs for compute-sanitizer share: device memory, random tensors, checks.
//
// Every buffer is an allocation of its own, exactly as large as the ABI asks, so that memcheck sees the first byte
// beyond it, and holds whatever cudaMalloc gives until something is written to it, so that initcheck sees a read of
// what nobody wrote.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "dijiang/kernels.h"

namespace sanitizer {

inline void require(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
    std::exit(3);
}

inline void require(dijiang_status status, const char* what) {
    if (status == DIJIANG_OK) return;
    std::fprintf(stderr, "%s: %s: %s\n", what, dijiang_status_name(status), dijiang_last_error());
    std::exit(4);
}

class Device {
public:
    explicit Device(size_t bytes) : bytes_(bytes) {
        if (bytes > 0) require(cudaMalloc(&data_, bytes), "cudaMalloc");
    }
    template <typename T> explicit Device(const std::vector<T>& values) : Device(values.size() * sizeof(T)) {
        require(cudaMemcpy(data_, values.data(), bytes_, cudaMemcpyHostToDevice), "copy to the device");
    }
    Device(const Device&) = delete;
    Device& operator=(const Device&) = delete;
    ~Device() { cudaFree(data_); }

    template <typename T = void> T* as() const { return static_cast<T*>(data_); }
    size_t bytes() const { return bytes_; }
    template <typename T> std::vector<T> copy() const {
        std::vector<T> host(bytes_ / sizeof(T));
        require(cudaMemcpy(host.data(), data_, bytes_, cudaMemcpyDeviceToHost), "copy to the host");
        return host;
    }

private:
    void* data_ = nullptr;
    size_t bytes_ = 0;
};

inline std::mt19937 rng(1);

inline std::vector<float> normal(size_t count, float scale) {
    std::normal_distribution<float> draw(0.0f, scale);
    std::vector<float> values(count);
    for (float& value : values) value = draw(rng);
    return values;
}

// The bits of T.
inline std::vector<uint8_t> typed(const std::vector<float>& values, int dtype) {
    std::vector<uint8_t> bytes(values.size() * (dtype == DIJIANG_FLOAT32 ? 4 : 2));
    for (size_t i = 0; i < values.size(); ++i) {
        const __half half = __float2half(values[i]);
        const __nv_bfloat16 bfloat = __float2bfloat16(values[i]);
        if (dtype == DIJIANG_FLOAT32) std::memcpy(&bytes[4 * i], &values[i], 4);
        if (dtype == DIJIANG_FLOAT16) std::memcpy(&bytes[2 * i], &half, 2);
        if (dtype == DIJIANG_BFLOAT16) std::memcpy(&bytes[2 * i], &bfloat, 2);
    }
    return bytes;
}

inline bool finite(const Device& output, int dtype) {
    if (dtype == DIJIANG_FLOAT32) {
        for (float value : output.copy<float>())
            if (!std::isfinite(value)) return false;
        return true;
    }
    const uint16_t exponent = dtype == DIJIANG_FLOAT16 ? 0x7c00 : 0x7f80;
    for (uint16_t value : output.copy<uint16_t>())
        if ((value & exponent) == exponent) return false;
    return true;
}

}  // namespace sanitizer
