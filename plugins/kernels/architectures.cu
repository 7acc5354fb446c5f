// nvcc's own list of what it compiles for, which it gives to CUDA sources only. It serves libraries compiled
// by hand; a build system defines DIJIANG_ARCHITECTURES.
#include <cstdio>

#include "device.h"

namespace dijiang {
namespace {

struct Text {
    char text[256];
    Text() noexcept : text{} {
        const int compiled[] = {__CUDA_ARCH_LIST__};
        size_t used = 0;
        for (const int architecture : compiled) {
            if (used > sizeof text - 16) return;
            const char* gap = used == 0 ? "" : " ";
            used += static_cast<size_t>(
                std::snprintf(text + used, sizeof text - used, "%ssm_%d", gap, architecture / 10));
        }
    }
};

}  // namespace

const char* compiled_list() noexcept {
    static const Text it;
    return it.text;
}

}  // namespace dijiang
