// dijiang_linear_with_workspace on a CPU: its own sources, with kernels on emulated threads and a cuBLASLt of the test's
// (cublaslt.cpp).
#include "cuda_on_cpu.h"

#include "host/errors.h"
#include "linear/many/cublaslt.h"
#include "linear/many/parts.cuh"
#include "linear/many/run.h"

// Instead of host/errors.cpp and CUDA's runtime.
namespace {
char said[512];
}
dijiang_status dijiang::fail(dijiang_status status, const char* format, ...) noexcept {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(said, sizeof said, format, arguments);
    va_end(arguments);
    return status;
}
dijiang_status dijiang::fail_cuda(cudaError_t, const char* what) noexcept { return fail(DIJIANG_CUDA_ERROR, "%s", what); }
extern "C" cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
extern "C" cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }

namespace dijiang::many {
namespace {

bool backwards = false;
alignas(128) unsigned char shared[emulator::kSharedMemory];

template <typename Params> cudaError_t start(void (*kernel)(Params), const Params& params, dim3 grid) {
    emulator::shared_memory = shared;
    for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x)
            emulator::run_block({x, y, 1}, dim3(kThreads), [&] { kernel(params); }, backwards);
    return cudaSuccess;
}

}  // namespace

template <typename T> cudaError_t widen(const Widen& it, bool, cudaStream_t) {
    return start(widen_kernel<T>, it, grid_of(it));
}
template <typename T> cudaError_t normalise(const Normalise& it, bool, cudaStream_t) {
    return start(normalise_kernel<T>, it, grid_of(it));
}
template <typename T> cudaError_t finish(const Finish& it, bool, cudaStream_t) {
    return start(finish_of<T>(it.activation), it, grid_of(it));
}
template cudaError_t widen<__half>(const Widen&, bool, cudaStream_t);
template cudaError_t normalise<__half>(const Normalise&, bool, cudaStream_t);
template cudaError_t finish<__half>(const Finish&, bool, cudaStream_t);
template cudaError_t widen<__nv_bfloat16>(const Widen&, bool, cudaStream_t);
template cudaError_t normalise<__nv_bfloat16>(const Normalise&, bool, cudaStream_t);
template cudaError_t finish<__nv_bfloat16>(const Finish&, bool, cudaStream_t);

}  // namespace dijiang::many

// A valid call of many rows whose pointers are the host's. `done` as run() says; `text` gets the plan, or why not.
extern "C" int32_t emulate_many(const dijiang_linear_call* call, void* workspace, int32_t from_behind, int32_t* done,
                                char* text, size_t size) {
    dijiang::many::backwards = from_behind != 0;
    bool was_done = false;
    std::string why;
    const dijiang_status status = dijiang::many::run(*call, workspace, false, nullptr, was_done, why);
    *done = was_done;
    if (status != DIJIANG_OK) why = said;
    else if (was_done) why = dijiang::many::describe(*call, dijiang::many::plan(*call));
    std::snprintf(text, size, "%s", why.c_str());
    return status;
}
extern "C" int64_t workspace_of_many(const dijiang_linear_call* call) { return dijiang::many::workspace(*call); }
extern "C" int32_t many_pays(const dijiang_linear_call* call, const dijiang_device* device) {
    return dijiang::many::pays(*call, *device) ? 1 : 0;
}
