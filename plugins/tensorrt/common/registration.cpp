// There are two ways in, and a process may use either or both:
//  - It opens the library (dlopen, ctypes.CDLL, trtexec --staticPlugins): the creators register themselves
//    with every TensorRT runtime that is loaded.
//  - It calls IPluginRegistry::loadLibrary (trtexec --dynamicPlugins), which opens the library, asks it for
//    its creators and registers them, and fails if they are registered already. So whoever asks for the
//    creators takes them over: what the library registered by itself is withdrawn first.
#include "common/registration.h"

#include <cstdint>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "common/host_symbols.h"
#include "common/log.h"
#include "common/names.h"

#define DIJIANG_EXPORT extern "C" __attribute__((visibility("default")))

namespace dijiang::trt {
namespace {

// 8.6.0 has the registry's functions in another order than 8.6.1 and later: a library that was compiled with
// the headers of one must not call the other's.
bool same_registry() {
#if NV_TENSORRT_MAJOR == 8
    using GetVersion = int32_t (*)();
    for (void* symbol : host_symbols("getInferLibVersion")) {
        const int32_t version = reinterpret_cast<GetVersion>(symbol)();  // e.g. 8601
        if ((version == 8600) == (NV_TENSORRT_VERSION == 8600)) continue;
        log(Severity::kWARNING,
            "not registered: compiled with the headers of TensorRT " + std::to_string(NV_TENSORRT_VERSION) +
                ", but this is " + std::to_string(version) +
                "; compile it with headers of that version, or load it with IPluginRegistry::loadLibrary");
        return false;
    }
#endif
    return true;
}

class OwnRegistration {
public:
    OwnRegistration() {
        if (!same_registry()) return;
        using GetRegistry = nvinfer1::IPluginRegistry* (*)();
        for (void* symbol : host_symbols("getPluginRegistry")) {
            nvinfer1::IPluginRegistry* registry = reinterpret_cast<GetRegistry>(symbol)();
            if (registry == nullptr) continue;
            for (Creator* creator : creators()) {
                if (registry->registerCreator(*creator, kPluginNamespace))
                    registered_.emplace_back(registry, creator);
            }
        }
    }

    // The registries are still there: they were made before this object, and their libraries stay loaded.
    ~OwnRegistration() { withdraw(); }

    void withdraw() noexcept {
        const std::lock_guard<std::mutex> lock(mutex_);
        for (const auto& [registry, creator] : registered_) registry->deregisterCreator(*creator);
        registered_.clear();
    }

private:
    std::mutex mutex_;
    std::vector<std::pair<nvinfer1::IPluginRegistry*, Creator*>> registered_;
};

OwnRegistration own_registration;

}  // namespace
}  // namespace dijiang::trt

DIJIANG_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
    dijiang::trt::set_logger_finder(finder);
}

#if NV_TENSORRT_MAJOR >= 10
DIJIANG_EXPORT dijiang::trt::Creator* const* getCreators(int32_t& count)
#else
DIJIANG_EXPORT dijiang::trt::Creator* const* getPluginCreators(int32_t& count)
#endif
{
    dijiang::trt::own_registration.withdraw();
    const dijiang::trt::Creators& creators = dijiang::trt::creators();
    count = static_cast<int32_t>(creators.size());
    return creators.data();
}
