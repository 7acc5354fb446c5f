// The C ABI of the library as a whole: versions, the last error, the device.
#include "host/device.h"
#include "host/errors.h"

#ifndef DIJIANG_VERSION
#define DIJIANG_VERSION "0+unknown"  // compiled by hand
#endif

using namespace dijiang;

int32_t dijiang_abi_version(void) { return DIJIANG_ABI_VERSION; }

const char* dijiang_version(void) { return DIJIANG_VERSION; }

const char* dijiang_architectures(void) { return architectures(); }

const char* dijiang_last_error(void) { return last_error(); }

const char* dijiang_status_name(int32_t status) {
    switch (status) {
        case DIJIANG_OK: return "DIJIANG_OK";
        case DIJIANG_INVALID_ARGUMENT: return "DIJIANG_INVALID_ARGUMENT";
        case DIJIANG_UNSUPPORTED: return "DIJIANG_UNSUPPORTED";
        case DIJIANG_CUDA_ERROR: return "DIJIANG_CUDA_ERROR";
        case DIJIANG_INTERNAL_ERROR: return "DIJIANG_INTERNAL_ERROR";
        default: return "unknown status";
    }
}

dijiang_status dijiang_query_device(dijiang_device* device) {
    return guarded([&]() -> dijiang_status {
        if (device == nullptr)
            return fail(DIJIANG_INVALID_ARGUMENT, "device is missing; got NULL; expected where to write it");
        return current_device(*device);
    });
}
