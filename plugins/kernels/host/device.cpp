#include "host/device.h"

#include <cuda_runtime_api.h>

#include <array>
#include <mutex>

#include "host/errors.h"

namespace dijiang {
namespace {

constexpr int kRemembered = 64;  // devices; those beyond are asked every time

struct Memory {
    std::mutex mutex;
    std::array<dijiang_device, kRemembered> devices{};  // compute_capability 0: not asked yet
};

Memory& memory() {
    static Memory it;
    return it;
}

dijiang_status ask(int index, dijiang_device& device) {
    int major = 0, minor = 0, multiprocessors = 0, shared = 0;
    const struct {
        cudaDeviceAttr attribute;
        int* value;
    } questions[] = {{cudaDevAttrComputeCapabilityMajor, &major},
                     {cudaDevAttrComputeCapabilityMinor, &minor},
                     {cudaDevAttrMultiProcessorCount, &multiprocessors},
                     {cudaDevAttrMaxSharedMemoryPerBlockOptin, &shared}};
    for (const auto& question : questions) {
        const cudaError_t error = cudaDeviceGetAttribute(question.value, question.attribute, index);
        if (error != cudaSuccess) return fail_cuda(error, "asking CUDA about the device");
    }
    device = {10 * major + minor, multiprocessors, shared, 0};
    return DIJIANG_OK;
}

// Graphs take programmatic launches since CUDA 12.3's driver.
bool driver_overlaps() {
    static const bool answer = [] {
        int version = 0;
        return cudaDriverGetVersion(&version) == cudaSuccess && version >= 12030;
    }();
    return answer;
}

dijiang_status check_capability(int32_t capability) {
    if (capability >= kLeastComputeCapability) return DIJIANG_OK;
    return fail(DIJIANG_UNSUPPORTED,
                "the GPU is too old; got compute capability %d.%d; expected 8.0 or newer "
                "(these kernels are compiled for %s)",
                capability / 10, capability % 10, architectures());
}

}  // namespace

const char* architectures() noexcept {
#ifdef DIJIANG_ARCHITECTURES
    return DIJIANG_ARCHITECTURES;
#else
    return compiled_list();
#endif
}

bool can_overlap(const dijiang_device& device) noexcept {
    return code_for(device.compute_capability) >= 90 && driver_overlaps();
}

dijiang_status current_device(dijiang_device& device) {
    int index = 0;
    const cudaError_t error = cudaGetDevice(&index);
    if (error != cudaSuccess) return fail_cuda(error, "asking CUDA for the current device");
    if (index < 0 || index >= kRemembered) {
        DIJIANG_TRY(ask(index, device));
    } else {
        const std::lock_guard<std::mutex> lock(memory().mutex);
        dijiang_device& remembered = memory().devices[static_cast<size_t>(index)];
        if (remembered.compute_capability == 0) DIJIANG_TRY(ask(index, remembered));
        device = remembered;
    }
    return check_capability(device.compute_capability);
}

dijiang_status check_device(const dijiang_device& device) {
    constexpr int32_t kLeastShared = 48 << 10;  // every CUDA device has that
    if (device.compute_capability <= 0)
        return fail(DIJIANG_INVALID_ARGUMENT,
                    "device.compute_capability is out of range; got %d; expected "
                    "10 * major + minor, e.g. 87",
                    device.compute_capability);
    DIJIANG_TRY(check_capability(device.compute_capability));
    if (device.multiprocessors < 1)
        return fail(DIJIANG_INVALID_ARGUMENT,
                    "device.multiprocessors is out of range; got %d; expected 1 or more",
                    device.multiprocessors);
    if (device.shared_memory < kLeastShared)
        return fail(DIJIANG_INVALID_ARGUMENT,
                    "device.shared_memory is out of range; got %d; expected %d bytes or more",
                    device.shared_memory, kLeastShared);
    if (device.reserved != 0)
        return fail(DIJIANG_INVALID_ARGUMENT, "device.reserved must be zero; got %d; expected 0",
                    device.reserved);
    return DIJIANG_OK;
}

dijiang_status given_or_current(const dijiang_device* given, dijiang_device& device) {
    if (given == nullptr) return current_device(device);
    DIJIANG_TRY(check_device(*given));
    device = *given;
    return DIJIANG_OK;
}

}  // namespace dijiang
