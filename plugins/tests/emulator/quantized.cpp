// dijiang_linear with quantised weights on a CPU: the kernels' own sources, compiled for emulated threads.
#include "cuda_on_cpu.h"

#include "host/errors.h"
#include "linear/quantized/kernels.cuh"

// Instead of host/errors.cpp, which needs CUDA's runtime.
dijiang_status dijiang::fail(dijiang_status status, const char*, ...) noexcept { return status; }

namespace dijiang::quantized {

// `extern __shared__` of the kernels.
alignas(128) uint4 shared[emulator::kSharedMemory / sizeof(uint4)];

namespace {

template <typename T> void run(const Launch& it, bool backwards) {
    const auto kernel = kernel_of<T>(it);
    const dim3 grid = grid_of(it);
    for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x)
            emulator::run_block({x, y, 1}, dim3(static_cast<unsigned>(it.threads)), [&] { kernel(it.params); }, backwards);
}

}  // namespace
}  // namespace dijiang::quantized

// A valid call whose pointers are the host's, cut as for `device`. 0, or 1 if it cannot be cut.
extern "C" int32_t emulate_quantized(const dijiang_linear_call* call, const dijiang_device* device, int32_t backwards,
                                     char* plan, size_t size) {
    using namespace dijiang::quantized;
    emulator::shared_memory = reinterpret_cast<unsigned char*>(shared);
    Launch launch;
    if (cut(*call, *device, launch) != DIJIANG_OK) return 1;
    std::snprintf(plan, size, "%s", describe(launch).c_str());
    if (call->dtype == DIJIANG_FLOAT16) run<__half>(launch, backwards != 0);
    else run<__nv_bfloat16>(launch, backwards != 0);
    return 0;
}
