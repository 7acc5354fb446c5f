// The text of a thread's last error, and the boundary that no exception crosses. Host only.
#pragma once

#include <cuda_runtime_api.h>

#include <exception>
#include <new>

#include "dijiang/kernels.h"

#if defined(__GNUC__)
#define DIJIANG_PRINTF(text, first) __attribute__((format(printf, text, first)))
#else
#define DIJIANG_PRINTF(text, first)
#endif

namespace dijiang {

const char* last_error() noexcept;
void clear_error() noexcept;

// Keeps the text for dijiang_last_error() and returns `status`. Texts read "what; got x; expected y".
DIJIANG_PRINTF(2, 3) dijiang_status fail(dijiang_status status, const char* format, ...) noexcept;

// What the CUDA runtime said about `what`; also takes the error away from the runtime, so that nobody meets
// it twice.
dijiang_status fail_cuda(cudaError_t error, const char* what) noexcept;

// Runs the body of an ABI function: forgets the last error before, and turns exceptions into a status.
template <typename Body>
dijiang_status guarded(Body&& body) noexcept {
    clear_error();
    try {
        return body();
    } catch (const std::bad_alloc&) {
        return fail(DIJIANG_INTERNAL_ERROR, "the host is out of memory");
    } catch (const std::exception& error) {
        return fail(DIJIANG_INTERNAL_ERROR, "unexpected: %s", error.what());
    } catch (...) {
        return fail(DIJIANG_INTERNAL_ERROR, "unexpected: an exception of unknown type");
    }
}

}  // namespace dijiang

// Leaves the calling function with the status of `expression` unless that is DIJIANG_OK.
#define DIJIANG_TRY(expression)                                          \
    do {                                                                 \
        const dijiang_status dijiang_try_status = (expression);          \
        if (dijiang_try_status != DIJIANG_OK) return dijiang_try_status; \
    } while (0)
