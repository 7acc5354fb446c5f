#include "host/arguments.h"

#include <cinttypes>

#include "host/errors.h"

namespace dijiang {
namespace {

dijiang_status overlap(const Region& a, const Region& b) {
    return fail(DIJIANG_INVALID_ARGUMENT,
                "%s overlaps %s; got [0x%" PRIxPTR ", 0x%" PRIxPTR ") and [0x%" PRIxPTR ", 0x%" PRIxPTR
                "); expected memory of its own",
                b.name, a.name, a.begin, a.begin + static_cast<uintptr_t>(extent(a)), b.begin,
                b.begin + static_cast<uintptr_t>(extent(b)));
}

}  // namespace

dijiang_status invalid_range(const char* what, int64_t got, const char* expected) {
    return fail(DIJIANG_INVALID_ARGUMENT, "%s is out of range; got %" PRId64 "; expected %s", what, got,
                expected);
}

dijiang_status check_size(int32_t batch, int32_t length) {
    const struct {
        const char* name;
        int32_t value, most;
    } sizes[] = {{"batch", batch, DIJIANG_MAX_BATCH}, {"length", length, DIJIANG_MAX_LENGTH}};
    for (const auto& it : sizes) {
        if (it.value < 0) return invalid_range(it.name, it.value, "0 or more");
        if (it.value > it.most)
            return fail(DIJIANG_UNSUPPORTED, "%s is more than the kernels support; got %d; expected 0 to %d",
                        it.name, it.value, it.most);
    }
    const int64_t tokens = int64_t{batch} * length;
    if (tokens > INT32_MAX)
        return fail(DIJIANG_UNSUPPORTED,
                    "batch * length is more than the kernels support; got %" PRId64
                    "; expected at "
                    "most %d",
                    tokens, INT32_MAX);
    return DIJIANG_OK;
}

dijiang_status check_pointer(const char* name, const void* pointer, uintptr_t alignment) {
    if (pointer == nullptr)
        return fail(DIJIANG_INVALID_ARGUMENT, "%s is missing; got NULL; expected a pointer to device memory",
                    name);
    if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0)
        return fail(DIJIANG_INVALID_ARGUMENT,
                    "%s is not aligned; got address %p; expected a multiple of %d bytes", name, pointer,
                    static_cast<int>(alignment));
    return DIJIANG_OK;
}

dijiang_status check_text(const char* text, size_t size) {
    if (text != nullptr && size > 0) return DIJIANG_OK;
    return fail(DIJIANG_INVALID_ARGUMENT,
                "text is missing; got %s; expected at least one byte of host memory",
                text == nullptr ? "NULL" : "size 0");
}

Region dense(const char* name, const void* pointer, int64_t bytes, bool written) {
    return {name, bytes > 0 ? reinterpret_cast<uintptr_t>(pointer) : 0, bytes, 1, 0, 1, 0, written};
}

dijiang_status check_apart(const Region* regions, int count, int one, int other) {
    for (int i = 0; i < count; ++i)
        for (int j = 0; j < i; ++j) {
            const bool may = (i == one && j == other) || (i == other && j == one);
            if (may || !(regions[i].written || regions[j].written) || disjoint(regions[i], regions[j]))
                continue;
            return regions[i].written ? overlap(regions[j], regions[i]) : overlap(regions[i], regions[j]);
        }
    return DIJIANG_OK;
}

}  // namespace dijiang
