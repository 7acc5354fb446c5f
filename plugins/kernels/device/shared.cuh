// A block's dynamic shared memory, as a place that every function may name: the compiler then knows where it is.
#pragma once

#include <vector_types.h>

namespace dijiang {

__device__ __forceinline__ unsigned char* shared_bytes() {
    extern __shared__ uint4 all_of_shared_memory[];
    return reinterpret_cast<unsigned char*>(all_of_shared_memory);
}

}  // namespace dijiang
