// CUDA's rule for shared memory, for tests on a CPU of kernels/host/launch.cpp: a block's static and dynamic memory
// may take 48 KB together, and more of the latter once a kernel was allowed it, up to what the device has.
#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <utility>

#include "host/launch.h"

namespace {

constexpr int kUnasked = 48 << 10, kMost = 227 << 10;

int device = 0, asked = 0;
std::map<std::pair<int, const void*>, int> allowed;  // dynamic bytes, of a kernel on a device
cudaLaunchConfig_t launched;
cudaLaunchAttribute attributes[2];

// A kernel is the address of its static bytes.
int static_bytes(const void* kernel) { return *static_cast<const int*>(kernel); }

}  // namespace

extern "C" {

cudaError_t cudaGetDevice(int* which) {
    *which = device;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int) {
    if (what != cudaDevAttrMaxSharedMemoryPerBlockOptin) return cudaErrorInvalidValue;
    *value = kMost;
    return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void* kernel) {
    *found = {};
    found->sharedSizeBytes = static_cast<size_t>(static_bytes(kernel));
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute what, int bytes) {
    ++asked;
    if (what != cudaFuncAttributeMaxDynamicSharedMemorySize || bytes + static_bytes(kernel) > kMost)
        return cudaErrorInvalidValue;
    allowed[{device, kernel}] = bytes;
    return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void**) {
    const auto found = allowed.find({device, kernel});
    const int most = found == allowed.end() ? kUnasked - static_bytes(kernel) : found->second;
    if (static_cast<int64_t>(config->dynamicSmemBytes) > most) return cudaErrorInvalidValue;
    launched = *config;
    for (unsigned i = 0; i < config->numAttrs; ++i) attributes[i] = config->attrs[i];
    return cudaSuccess;
}

// The status of a launch of a kernel with so much static memory, on a device.
int emulated_launch(const int* kernel, int on, int64_t dynamic, int cluster, int overlap) {
    device = on;
    const dijiang::LaunchShape shape = {dim3(8), 128, static_cast<size_t>(dynamic), cluster, overlap != 0};
    void* arguments[] = {nullptr};
    return dijiang::launch_kernel(kernel, shape, arguments, nullptr);
}

// How often CUDA was asked for more.
int emulated_asked() { return asked; }

// The last launch: blocks of a cluster (0: it has none), and whether it may overlap the kernel before.
void emulated_last(int* cluster, int* overlap) {
    *cluster = *overlap = 0;
    for (unsigned i = 0; i < launched.numAttrs; ++i) {
        if (attributes[i].id == cudaLaunchAttributeClusterDimension)
            *cluster = static_cast<int>(attributes[i].val.clusterDim.x);
        if (attributes[i].id == cudaLaunchAttributeProgrammaticStreamSerialization)
            *overlap = attributes[i].val.programmaticStreamSerializationAllowed;
    }
}

}  // extern "C"
