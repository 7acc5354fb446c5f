// The step's C ABI on a host: the project's own checks, plan, packing and kernel, on emulated threads.
//
// EMULATED_MULTIPROCESSORS says how many blocks there may be, EMULATED_SHARED_MEMORY how many bytes a block may have.
#include "emulator.h"
#include "host/device.h"
#include "host/errors.h"
#include "step/quantised/kernel.cuh"
#include "step/pack.cuh"

// What the checks need of the CUDA runtime.
extern "C" {
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t) { return "emulated"; }
const char* cudaGetErrorString(cudaError_t) { return "nobody can go on"; }
}

namespace dijiang {

dijiang_status current_device(dijiang_device& device) {
    const char* const count = std::getenv("EMULATED_MULTIPROCESSORS");
    const char* const shared = std::getenv("EMULATED_SHARED_MEMORY");
    device = {step::capability(), count ? std::atoi(count) : 4, shared ? std::atoi(shared) : 232448, 0};
    return DIJIANG_OK;
}
dijiang_status given_or_current(const dijiang_device* given, dijiang_device& device) {
    if (given != nullptr) return device = *given, DIJIANG_OK;
    return current_device(device);
}
const char* architectures() noexcept { return "emulated"; }

namespace step {
namespace {

// Threads that never wait run one after the other.
template <typename Kernel> void each(int64_t threads, Kernel kernel) {
    emulator::Fibre fibre;
    emulator::current = &fibre;
    emulator::block_size = dim3(256);
    emulator::grid = dim3(static_cast<unsigned>((threads + 255) / 256));
    for (fibre.block.x = 0; fibre.block.x < emulator::grid.x; ++fibre.block.x)
        for (fibre.thread.x = 0; fibre.thread.x < 256; ++fibre.thread.x) kernel();
}

}  // namespace

// Some of the instances are enough: compiling is what the tests spend most time on.
constexpr bool here(int dtype, int capacity) { return (capacity == 4) == (dtype == DIJIANG_BFLOAT16); }

template <int kDtype> using Element = std::conditional_t<kDtype == DIJIANG_FLOAT16, __half, __nv_bfloat16>;

template <typename Kernel> cudaError_t emulate(const Plan& plan, Kernel kernel) {
    kCopiers = capability() >= 90 ? 1 : 32;
    const bool good = emulator::run(dim3(plan.params.layout.blocks), dim3(kThreads + 32), plan.params.memory.size, kernel);
    return good ? cudaSuccess : cudaErrorLaunchTimeout;
}

template <int kDtype, int kCapacity> cudaError_t launch(const Plan& plan, cudaStream_t) {
    using T = Element<kDtype>;
    if constexpr (here(kDtype, kCapacity))
        return emulate(plan, [&] {
            if (plan.params.layout.parallel) step_kernel<T, kCapacity, true>(plan.params);
            else step_kernel<T, kCapacity, false>(plan.params);
        });
    return cudaErrorNotSupported;
}
template <int kDtype, int kCapacity> cudaError_t launch_quantised(const Plan& plan, cudaStream_t) {
    if constexpr (here(kDtype, kCapacity))
        return emulate(plan, [&] {
            if constexpr (has_wide(kDtype, kCapacity))  // with EMULATED_WIDE as if all models were
                if (is_wide(plan.params.layout) || std::getenv("EMULATED_WIDE"))
                    return quantised_step_kernel<Element<kDtype>, kCapacity, true>(plan.params);
            quantised_step_kernel<Element<kDtype>, kCapacity, false>(plan.params);
        });
    return cudaErrorNotSupported;
}
template cudaError_t launch<DIJIANG_FLOAT16, 1>(const Plan&, cudaStream_t);
template cudaError_t launch<DIJIANG_FLOAT16, 2>(const Plan&, cudaStream_t);
template cudaError_t launch<DIJIANG_FLOAT16, 4>(const Plan&, cudaStream_t);
template cudaError_t launch<DIJIANG_FLOAT16, 8>(const Plan&, cudaStream_t);
template cudaError_t launch<DIJIANG_BFLOAT16, 1>(const Plan&, cudaStream_t);
template cudaError_t launch<DIJIANG_BFLOAT16, 2>(const Plan&, cudaStream_t);
template cudaError_t launch<DIJIANG_BFLOAT16, 4>(const Plan&, cudaStream_t);
template cudaError_t launch<DIJIANG_BFLOAT16, 8>(const Plan&, cudaStream_t);
template cudaError_t launch_quantised<DIJIANG_FLOAT16, 1>(const Plan&, cudaStream_t);
template cudaError_t launch_quantised<DIJIANG_FLOAT16, 2>(const Plan&, cudaStream_t);
template cudaError_t launch_quantised<DIJIANG_FLOAT16, 4>(const Plan&, cudaStream_t);
template cudaError_t launch_quantised<DIJIANG_FLOAT16, 8>(const Plan&, cudaStream_t);
template cudaError_t launch_quantised<DIJIANG_BFLOAT16, 1>(const Plan&, cudaStream_t);
template cudaError_t launch_quantised<DIJIANG_BFLOAT16, 2>(const Plan&, cudaStream_t);
template cudaError_t launch_quantised<DIJIANG_BFLOAT16, 4>(const Plan&, cudaStream_t);
template cudaError_t launch_quantised<DIJIANG_BFLOAT16, 8>(const Plan&, cudaStream_t);

}  // namespace step
}  // namespace dijiang

// pack.cu's launches, without a GPU.
#define DIJIANG_PACK_EACH(threads, kernel, ...) (void)stream, each(threads, [&] { kernel(__VA_ARGS__); })
#include "step/pack.cu"
