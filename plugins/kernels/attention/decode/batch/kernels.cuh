// The instances of the two kernels of one element type.
#pragma once

#include "attention/decode/batch/features.cuh"
#include "attention/decode/batch/states.cuh"

namespace dijiang {
namespace decode {

template <typename T, typename F, typename S> BatchKernels batch_instance(int64_t least_bytes) {
    BatchKernels it;
    it.features = reinterpret_cast<const void*>(features_kernel<T, F>);
    it.states = reinterpret_cast<const void*>(states_kernel<T, S>);
    static_assert(F::kSlices == S::kSlices && F::D == S::D, "one reads what the other writes");
    it.vectors = F::kVectors;
    it.slices = F::kSlices;
    it.feature_threads = F::kThreads;
    it.feature_memory = F::kMemory;
    it.width = S::W;
    it.head_threads = S::kThreads;
    it.most_heads = S::kMostHeads;
    it.head_memory = S::kMemory;
    it.least_bytes = least_bytes;
    return it;
}

template <typename T> BatchKernels batch_kernels(int32_t head_dim) {
    constexpr int64_t kKib = 1024;
    using S64 = StateShape<64, 64, 128, 8, 1, 4, 0, false>;
    using S80 = StateShape<80, 80, 160, 10, 1, 3, 0, false>;
    using S128 = StateShape<128, 128, 256, 8, 1, 1, 3, true>;
    using S256 = StateShape<256, 64, 256, 8, 4, 1, 3, true>;
    switch (head_dim) {
        case 64: return batch_instance<T, FeatureShape<64, 64>, S64>(384 * kKib);
        case 80: return batch_instance<T, FeatureShape<80, 80>, S80>(128 * kKib);
        case 128: return batch_instance<T, FeatureShape<128, 128>, S128>(384 * kKib);
        case 256: return batch_instance<T, FeatureShape<256, 64>, S256>(768 * kKib);
        default: return {};
    }
}

}  // namespace decode
}  // namespace dijiang
