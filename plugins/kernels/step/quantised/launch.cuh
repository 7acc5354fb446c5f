// Launches the step kernel with quantised weights of one type and capacity.
#pragma once

#include "step/launch.cuh"
#include "step/quantised/kernel.cuh"

namespace dijiang {
namespace step {

template <int kDtype, int kCapacity> cudaError_t launch_quantised(const Plan& plan, cudaStream_t stream) {
    using T = typename Element<kDtype>::type;
    return launch_cooperatively(reinterpret_cast<const void*>(quantised_step_kernel<T, kCapacity>), plan, stream);
}

}  // namespace step
}  // namespace dijiang
