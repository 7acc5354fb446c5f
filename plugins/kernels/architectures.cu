// What this library was compiled for. A build system says it by defining DIJIANG_ARCHITECTURES; compiled by
// hand, the compiler's own list serves (it exists in CUDA sources only, and does not tell PTX from binaries).
#include "device.h"

#ifndef DIJIANG_ARCHITECTURES
#include <cstdio>
#endif

namespace dijiang {

#ifdef DIJIANG_ARCHITECTURES
const char* architectures() noexcept { return DIJIANG_ARCHITECTURES; }
#else
namespace {
struct Text {
    char text[256];
    Text() noexcept : text{} {
        const int compiled[] = {__CUDA_ARCH_LIST__};
        size_t used = 0;
        for (const int architecture : compiled)
            if (used < sizeof text - 16)
                used += static_cast<size_t>(std::snprintf(text + used, sizeof text - used, "%ssm_%d",
                                                          used == 0 ? "" : " ", architecture / 10));
    }
};
}  // namespace

const char* architectures() noexcept {
    static const Text it;
    return it.text;
}
#endif

}  // namespace dijiang
