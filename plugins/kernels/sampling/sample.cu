// How dijiang_sample is cut and launched.
#include <algorithm>

#include "sampling/sample.cuh"

namespace dijiang {
namespace {

__global__ void __launch_bounds__(kThreads, 1)
    sample_kernel(const __grid_constant__ SampleParams params, const __grid_constant__ SampleCut cut) {
    sample_row(params, cut);
}

constexpr int kMemory = sizeof(SampleMemory);

}  // namespace

SampleCut cut_sample(int32_t batch, int32_t vocabulary, const dijiang_device& device, bool greedy) {
    constexpr int kEnough = 2048;  // ids for a block; fewer do not pay for another one
    const auto per_warp = [&](int team) { return 32 * ((vocabulary - 1) / (kThreads * team) + 1); };
    int team = 1;
    const bool clusters = device.compute_capability >= 90;
    while (clusters && team < kMostTeam && vocabulary / team > kEnough &&
           int64_t{2} * team * batch <= device.multiprocessors)
        team *= 2;
    SampleCut cut{team, per_warp(team), 0};
    const int64_t bytes = int64_t{4} * kWarps * cut.per_warp;
    if (!greedy && bytes <= device.shared_memory - kMemory) cut.staged_bytes = static_cast<int>(bytes);
    return cut;
}

cudaError_t launch_sample(const SampleParams& params, const SampleCut& cut, const dijiang_device& device, bool overlap,
                          cudaStream_t stream) {
    // Always the same value, because threads that launch at the same time share it.
    const cudaError_t error =
        cudaFuncSetAttribute(sample_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_memory);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(params.buffers.batch * cut.team));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = static_cast<size_t>(kMemory + cut.staged_bytes);
    config.stream = stream;
    config.attrs = attributes;
    if (cut.team > 1) {
        attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(cut.team), 1, 1};
    }
    if (overlap) {
        attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    return cudaLaunchKernelEx(&config, sample_kernel, params, cut);
}

}  // namespace dijiang
