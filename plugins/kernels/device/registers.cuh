// Hints of what not to keep in registers, and when to compute it.
#pragma once

#include <cstdint>

namespace dijiang {

// The same number, but computed anew from here on: keeps what derives from it out of registers until it is needed.
__device__ __forceinline__ int opaque(int x) {
    asm volatile("" : "+r"(x));
    return x;
}
// This thread's number and lane, read anew so that nothing derived from them is kept in a register between two uses.
__device__ __forceinline__ int fresh_thread() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}
__device__ __forceinline__ int fresh_lane() {
    int lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    return lane;
}

// x is computed, or asked for, before the next barrier or branch, not after it.
__device__ __forceinline__ void keep_before(uint32_t& x) { asm volatile("" : "+r"(x)); }
__device__ __forceinline__ void keep_before(int& x) { asm volatile("" : "+r"(x)); }
__device__ __forceinline__ void keep_before(float& x) { asm volatile("" : "+f"(x)); }
template <typename T> __device__ __forceinline__ void keep_before(T*& x) { asm volatile("" : "+l"(x)); }

}  // namespace dijiang
