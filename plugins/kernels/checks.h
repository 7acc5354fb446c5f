// Checks of what a caller passes, all on the host.
#pragma once

#include "attention.h"
#include "regions.h"

namespace dijiang {

dijiang_status check_geometry(const dijiang_geometry* geometry);

// batch and length from 0 to what the kernels can count to.
dijiang_status check_size(int32_t batch, int32_t length);

// A pointer that must not be null and must be a multiple of `alignment` bytes.
dijiang_status check_pointer(const char* name, const void* pointer, uintptr_t alignment);

// Where a text is written to on the host.
dijiang_status check_text(const char* text, size_t size);

// No written region may share a byte with another. `one` and `other` are indices of two that may coincide, or
// -1.
dijiang_status check_apart(const Region* regions, int count, int one = -1, int other = -1);

// A dense run of bytes as a region; absent if it is empty.
Region dense(const char* name, const void* pointer, int64_t bytes, bool written);

// Everything that needs no look into device memory and no GPU. Fills `params`; batch and length are positive.
dijiang_status check_attention(const dijiang_geometry& geometry, int32_t batch, int32_t length,
                               const dijiang_attention_buffers& buffers, AttentionParams& params);

// Is there as much workspace and sync as the call needs?
dijiang_status check_scratch(const dijiang_attention_buffers& buffers, const Needs& needs);

// The same for length 0, where only the states are looked at. Strides in `params` are filled for them alone.
dijiang_status check_states(const dijiang_geometry& geometry, int32_t batch,
                            const dijiang_attention_buffers& buffers, AttentionParams& params);

}  // namespace dijiang
