// Programmatic dependent launch: a kernel may begin while the one before it in the stream still runs.
#pragma once

namespace dijiang {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// The next kernel may take its place on the multiprocessors now; what the previous one wrote may be read after
// the wait. Both do nothing in an ordinary launch.
__device__ __forceinline__ void let_next_kernel_start() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
__device__ __forceinline__ void wait_for_previous_kernel() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

#else

__device__ __forceinline__ void let_next_kernel_start() {}
__device__ __forceinline__ void wait_for_previous_kernel() {}

#endif

}  // namespace dijiang
