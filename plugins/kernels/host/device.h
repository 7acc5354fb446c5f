// What is known of GPUs on the host.
#pragma once

#include "dijiang/kernels.h"

namespace dijiang {

constexpr int32_t kLeastComputeCapability = 80;

// What the library was compiled for, e.g. "sm_80 sm_90 compute_90".
const char* architectures() noexcept;

// The same as nvcc itself knows it, which does not tell PTX from binaries (architectures.cu).
const char* compiled_list() noexcept;

// The newest compute_* that the kernels are compiled from and a GPU can run, as 10 * major + minor.
int32_t code_for(int32_t compute_capability) noexcept;

// May a kernel begin before the one ahead of it in the stream has ended (programmatic dependent launch)? Only
// code of compute capability 9.0 and up waits by itself for what it needs.
bool can_overlap(const dijiang_device& device) noexcept;

// The current device: asked of CUDA once per device, then remembered. Fails for GPUs that are too old.
dijiang_status current_device(dijiang_device& device);

// A description that a caller wrote: are its numbers possible?
dijiang_status check_device(const dijiang_device& device);

// *given after a check, or the current device if it is null.
dijiang_status given_or_current(const dijiang_device* given, dijiang_device& device);

}  // namespace dijiang
