// Which kernel a launch has, and its blocks.
#pragma once

#include "linear/quantized/few.cuh"
#include "linear/quantized/many.cuh"

namespace dijiang {
namespace quantized {

template <typename T> auto kernel_of(const Launch& launch) -> void (*)(Params) {
    if (launch.many) return launch.params.rows_per_block > 64 ? many_kernel<T, 4> : many_kernel<T, 2>;
    return launch.params.rows_per_block > 8 ? few_kernel<T, true> : few_kernel<T, false>;
}

inline dim3 grid_of(const Launch& launch) {
    const auto blocks = static_cast<unsigned>(launch.blocks), row_blocks = static_cast<unsigned>(launch.row_blocks);
    return launch.many ? dim3(row_blocks, blocks) : dim3(blocks, row_blocks);
}

}  // namespace quantized
}  // namespace dijiang
