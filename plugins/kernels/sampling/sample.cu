// How dijiang_sample is cut and launched.
#include <algorithm>
#include <mutex>

#include "host/device.h"
#include "sampling/sample.cuh"

namespace dijiang {
namespace {

__global__ void __launch_bounds__(kThreads, kBlocks)
    sample_kernel(const __grid_constant__ SampleParams params, const __grid_constant__ SampleCut cut) {
    sample_row(params, cut);
}

constexpr int kMemory = sizeof(SampleMemory);

// What every launch has in common.
struct Launch {
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config{};

    Launch(int rows, int team, int memory) {
        config.gridDim = dim3(static_cast<unsigned>(rows * team));
        config.blockDim = dim3(kThreads);
        config.dynamicSmemBytes = static_cast<size_t>(memory);
        config.attrs = attributes;
        if (team == 1) return;
        attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(team), 1, 1};
    }
    Launch(const Launch&) = delete;
    Launch& operator=(const Launch&) = delete;
};

// Does the code that this GPU runs know of clusters?
bool has_clusters(const dijiang_device& device) { return code_for(device.compute_capability) >= 90; }

// Always the same value, because threads that launch at the same time share it.
cudaError_t allow_memory(const dijiang_device& device) {
    return cudaFuncSetAttribute(sample_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_memory);
}

cudaError_t ask_large_clusters(const dijiang_device& device, int& count) {
    cudaError_t error = allow_memory(device);
    if (error != cudaSuccess) return error;
    error = cudaFuncSetAttribute(sample_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return error;
    const Launch launch(1, kMostTeam, device.shared_memory);  // as if each block had a multiprocessor of its own
    error = cudaOccupancyMaxActiveClusters(&count, sample_kernel, &launch.config);
    if (error == cudaSuccess) return error;
    cudaGetLastError();  // such clusters are not for this GPU
    count = 0;
    return cudaSuccess;
}

}  // namespace

cudaError_t large_clusters(const dijiang_device& device, int& count) {
    constexpr int kRemembered = 64;  // devices; those beyond are asked every time
    static std::mutex mutex;
    static int known[kRemembered];  // 1 more than there are; 0: not asked yet
    count = 0;
    if (!has_clusters(device)) return cudaSuccess;
    int index = 0;
    const cudaError_t error = cudaGetDevice(&index);
    if (error != cudaSuccess) return error;
    if (index >= kRemembered) return ask_large_clusters(device, count);
    const std::lock_guard<std::mutex> lock(mutex);
    if (known[index] == 0) {
        const cudaError_t asked = ask_large_clusters(device, count);
        if (asked != cudaSuccess) return asked;
        known[index] = count + 1;
    }
    count = known[index] - 1;
    return cudaSuccess;
}

SampleCut cut_sample(int32_t batch, int32_t vocabulary, const dijiang_device& device, int large, bool greedy) {
    constexpr int kEnough = 2048;  // ids for a block; fewer do not pay for another one
    const auto per_warp = [&](int team) { return 32 * ((vocabulary - 1) / (kThreads * team) + 1); };
    const int most = large >= batch ? kMostTeam : kPortableTeam;
    const int blocks = device.shared_memory >= kBlocks * kMemory ? kBlocks : 1;  // of a multiprocessor
    const int64_t room = int64_t{blocks} * device.multiprocessors;
    int team = 1;
    while (has_clusters(device) && team < most && vocabulary / team > kEnough && int64_t{2} * team * batch <= room) team *= 2;
    SampleCut cut{team, per_warp(team), 0};
    const int64_t bytes = int64_t{4} * kWarps * cut.per_warp;
    // With more blocks than multiprocessors, two of them share one, and scores that leave no room for the other are
    // read again instead.
    constexpr int kReserved = 1024;  // of a multiprocessor's shared memory for each block: CUDA programming guide, 9.0
    int memory = device.shared_memory;
    if (int64_t{team} * batch > device.multiprocessors) memory = (memory + kReserved) / blocks - kReserved;
    if (!greedy && kMemory + bytes <= memory) cut.staged_bytes = static_cast<int>(bytes);
    return cut;
}

cudaError_t launch_sample(const SampleParams& params, const SampleCut& cut, const dijiang_device& device, bool overlap,
                          cudaStream_t stream) {
    const cudaError_t error = allow_memory(device);
    if (error != cudaSuccess) return error;
    Launch launch(params.buffers.batch, cut.team, kMemory + cut.staged_bytes);
    launch.config.stream = stream;
    if (overlap) {
        launch.attributes[launch.config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        launch.attributes[launch.config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    return cudaLaunchKernelEx(&launch.config, sample_kernel, params, cut);
}

}  // namespace dijiang
