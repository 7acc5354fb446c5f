// The step's C ABI on a host: the project's own checks, plan, packing and kernel, on emulated threads.
//
// EMULATED_MULTIPROCESSORS says how many blocks there may be.
#include "emulator.h"
#include "host/device.h"
#include "host/errors.h"
#include "step/kernel.cuh"
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
    device = {90, count ? std::atoi(count) : 4, 232448, 0};
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

template <typename T> cudaError_t emulate(const Plan& plan) {
    const auto run = [&](auto kernel) {
        return emulator::run(dim3(plan.params.layout.blocks), dim3(kThreads + 32), plan.params.memory.size,
                             [&] { kernel(plan.params); });
    };
    const bool good = plan.capacity == 1   ? run(step_kernel<T, 1>)
                      : plan.capacity == 2 ? run(step_kernel<T, 2>)
                      : plan.capacity == 4 ? run(step_kernel<T, 4>)
                                           : run(step_kernel<T, 8>);
    return good ? cudaSuccess : cudaErrorLaunchTimeout;
}

}  // namespace

cudaError_t launch_f16(const Plan& plan, cudaStream_t) { return emulate<__half>(plan); }
cudaError_t launch_bf16(const Plan& plan, cudaStream_t) { return emulate<__nv_bfloat16>(plan); }

}  // namespace step
}  // namespace dijiang

// pack.cu's launches, without a GPU.
#define DIJIANG_PACK_EACH(threads, kernel, ...) (void)stream, each(threads, [&] { kernel(__VA_ARGS__); })
#include "step/pack.cu"
