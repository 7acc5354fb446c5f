// Checks of arguments that every function of the C ABI has: numbers, pointers, texts, memory that overlaps.
// All on the host; a pointer is never followed.
#pragma once

#include "dijiang/kernels.h"
#include "host/regions.h"

namespace dijiang {

constexpr int64_t kMostStride = int64_t{1} << 40;  // elements; keeps every product of it with a size in 64 bits

// Fails: "`what` is out of range; got ...; expected ...".
dijiang_status invalid_range(const char* what, int64_t got, const char* expected);

// batch and length from 0 to what the kernels can count to.
dijiang_status check_size(int32_t batch, int32_t length);

// A pointer that must not be null and must be a multiple of `alignment` bytes.
dijiang_status check_pointer(const char* name, const void* pointer, uintptr_t alignment);

// Where a text is written to on the host.
dijiang_status check_text(const char* text, size_t size);

// A dense run of bytes as a region; absent if it is empty.
Region dense(const char* name, const void* pointer, int64_t bytes, bool written);

// No written region may share a byte with another. `one` and `other` are indices of two that may coincide, or
// -1.
dijiang_status check_apart(const Region* regions, int count, int one = -1, int other = -1);

}  // namespace dijiang
