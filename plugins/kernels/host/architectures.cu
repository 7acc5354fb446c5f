// nvcc's own list of the compute_* that it compiles from, which it gives to CUDA sources only.
#include <cstdio>

#include "host/device.h"

namespace dijiang {
namespace {

// E.g. 800, 900.
constexpr int32_t kCompiledFor[] = {__CUDA_ARCH_LIST__};

// The list as text, for libraries compiled by hand; a build system defines DIJIANG_ARCHITECTURES.
struct Text {
    char text[256];
    Text() noexcept : text{} {
        size_t used = 0;
        for (const int32_t architecture : kCompiledFor) {
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

int32_t code_for(int32_t compute_capability) noexcept {
    int32_t best = 0;
    for (const int32_t architecture : kCompiledFor)
        if (architecture <= 10 * compute_capability && architecture / 10 > best) best = architecture / 10;
    return best;
}

}  // namespace dijiang
