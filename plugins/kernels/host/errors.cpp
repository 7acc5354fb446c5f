#include "host/errors.h"

#include <cstdarg>
#include <cstdio>

#include "host/device.h"

namespace dijiang {
namespace {
// A plain array: nothing to construct, destroy or allocate in threads that come and go.
thread_local char text[1024] = "";
}  // namespace

const char* last_error() noexcept { return text; }

void clear_error() noexcept { text[0] = '\0'; }

dijiang_status fail(dijiang_status status, const char* format, ...) noexcept {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    return status;
}

dijiang_status fail_cuda(cudaError_t error, const char* what) noexcept {
    cudaGetLastError();
    switch (error) {
        case cudaErrorNoKernelImageForDevice:
        case cudaErrorInvalidDeviceFunction:
        case cudaErrorUnsupportedPtxVersion:
        case cudaErrorNotSupported:
            return fail(DIJIANG_UNSUPPORTED,
                        "%s cannot run on this GPU; got %s; expected a GPU that code for %s runs on", what,
                        cudaGetErrorName(error), architectures());
        default:
            return fail(DIJIANG_CUDA_ERROR, "%s failed; got %s (%s)", what, cudaGetErrorName(error),
                        cudaGetErrorString(error));
    }
}

}  // namespace dijiang
