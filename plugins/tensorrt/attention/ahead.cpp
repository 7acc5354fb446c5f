#include "attention/ahead.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <sstream>

namespace dijiang::trt::attention {
namespace {

// The GPUs of TensorRT for RTX 1.7 by compute capability, with the multiprocessors of the largest die of each
// (GA100, GA102, AD102, GB202, GB10), and the shared memory that a block may ask for (CUDA C++ Programming
// Guide, "Technical Specifications per Compute Capability").
constexpr dijiang_device kLargest[] = {
    {80, 128, 163 << 10, 0}, {86, 84, 99 << 10, 0}, {89, 144, 99 << 10, 0},
    {120, 192, 99 << 10, 0}, {121, 48, 99 << 10, 0},
};

// Machine code for the capability itself, or PTX for it or an older one.
bool has_code(const std::string& architectures, int32_t capability) {
    std::istringstream names(architectures);
    for (std::string name; names >> name;) {
        const size_t at = name.find('_');
        if (at == std::string::npos) continue;
        const int32_t number = std::atoi(name.c_str() + at + 1);
        if (name.compare(0, at, "sm") == 0 ? number == capability : number <= capability) return true;
    }
    return false;
}

}  // namespace

bool builds_ahead() {
    // Only asks: what is not loaded stays so.
    void* handle = dlopen("libtensorrt_rtx.so.1", RTLD_LAZY | RTLD_NOLOAD);
    if (handle != nullptr) dlclose(handle);
    return handle != nullptr;
}

std::string workspace_anywhere(const dijiang_geometry& geometry, int32_t batch, int32_t length,
    const std::string& architectures, size_t& bytes) {
    bytes = 0;
    bool any = false;
    for (const dijiang_device& largest : kLargest) {
        if (!has_code(architectures, largest.compute_capability)) continue;
        any = true;
        // How prefill is cut needs the more memory the more multiprocessors there are. Decoding has two
        // kernels, one for much work per multiprocessor and one for little: one of them meets each end.
        for (const int32_t multiprocessors : {1, largest.multiprocessors}) {
            dijiang_device device = largest;
            device.multiprocessors = multiprocessors;
            size_t needed = 0;
            const dijiang_status status =
                dijiang_attention_workspace_size(&geometry, batch, length, &device, &needed);
            if (status != DIJIANG_OK)
                return std::string(dijiang_status_name(status)) + ": " + dijiang_last_error();
            bytes = std::max(bytes, needed);
        }
    }
    if (any) return {};
    return "the plugin has code for none of this runtime's GPUs; got " + architectures +
           "; expected some of sm_80, sm_86, sm_89, sm_120, sm_121, or compute_80";
}

}  // namespace dijiang::trt::attention
