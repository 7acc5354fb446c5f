#include "common/host_symbols.h"

#include <NvInferVersion.h>
#include <dlfcn.h>

#include <algorithm>
#include <string>

namespace dijiang::trt {

std::vector<void*> host_symbols(const char* name) {
    std::vector<void*> found;
    const auto add = [&found](void* symbol) {
        if (symbol != nullptr && std::find(found.begin(), found.end(), symbol) == found.end()) {
            found.push_back(symbol);
        }
    };
    add(dlsym(RTLD_DEFAULT, name));
    const std::string major = std::to_string(NV_TENSORRT_MAJOR);
    std::vector<std::string> libraries;
    for (const char* library : {"libnvinfer.so.", "libnvinfer_lean.so.", "libnvinfer_dispatch.so."}) {
        libraries.push_back(library + major);
    }
#if NV_TENSORRT_MAJOR == 11
    libraries.push_back("libtensorrt_rtx.so.1");  // counts its own versions, and has 11's interfaces
#endif
    for (const std::string& file : libraries) {
        // Only asks: RTLD_NOLOAD opens nothing that is not there already. The handle is kept on purpose, so
        // that what is found stays there.
        if (void* handle = dlopen(file.c_str(), RTLD_LAZY | RTLD_NOLOAD); handle != nullptr) {
            add(dlsym(handle, name));
        }
    }
    return found;
}

}  // namespace dijiang::trt
