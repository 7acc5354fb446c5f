// Launches the step kernel with quantised weights of one type and capacity.
#pragma once

#include "step/launch.cuh"
#include "step/quantised/kernel.cuh"

namespace dijiang {
namespace step {

template <int kDtype, int kCapacity> cudaError_t launch_quantised(const Plan& plan, cudaStream_t stream) {
    using T = typename Element<kDtype>::type;
    const void* kernel = reinterpret_cast<const void*>(quantised_step_kernel<T, kCapacity, false>);
    if constexpr (has_wide(kDtype, kCapacity))
        if (is_wide(plan.params.layout)) kernel = reinterpret_cast<const void*>(quantised_step_kernel<T, kCapacity, true>);
    return launch_cooperatively(kernel, plan, stream);
}

}  // namespace step
}  // namespace dijiang
