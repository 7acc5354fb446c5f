// How dijiang_sample is cut and launched.
#include <algorithm>
#include <mutex>

#include "host/device.h"
#include "sampling/sample.cuh"

namespace dijiang {
namespace {

__global__ void __launch_bounds__(kMostThreads)
    sample_kernel(const __grid_constant__ SampleParams params, const __grid_constant__ SampleCut cut) {
    sample_row(params, cut);
}

// What every launch has in common.
struct Launch {
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config{};

    Launch(int rows, int team, int threads, int memory) {
        config.gridDim = dim3(static_cast<unsigned>(rows * team));
        config.blockDim = dim3(static_cast<unsigned>(threads));
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
    const Launch launch(1, kMostTeam, kLeastThreads, device.shared_memory);  // as if each block had a multiprocessor of its own
    error = cudaOccupancyMaxActiveClusters(&count, sample_kernel, &launch.config);
    if (error == cudaSuccess) return error;
    cudaGetLastError();  // such clusters are not for this GPU
    count = 0;
    return cudaSuccess;
}

// The threads of a block and the blocks of a row.
void shape(SampleCut& cut, int32_t batch, int32_t vocabulary, const dijiang_device& device, int large) {
    constexpr int kEnough = 2048;  // ids for a block; fewer do not pay for another one
    const int most = large >= batch ? kMostTeam : kPortableTeam;
    if (!has_clusters(device)) return;
    if (int64_t{most} * batch <= device.multiprocessors) cut.threads = kLeastThreads;
    while (cut.team < most && vocabulary / cut.team > kEnough && int64_t{2} * cut.team * batch <= device.multiprocessors)
        cut.team *= 2;
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

SampleCut cut_sample(int32_t batch, int32_t vocabulary, const dijiang_device& device, int large, const SampleNeeds& needs) {
    SampleCut cut{kMostThreads, 1, 0, 0, 0, false};
    shape(cut, batch, vocabulary, device, large);
    cut.per_warp = 32 * ((vocabulary - 1) / (cut.threads * cut.team) + 1);
    const bool few = are_few(needs.top_k, cut.threads * cut.team);
    cut.slim = !needs.filters || few;
    cut.bytes = needs.filters ? kFullMemory : kSlimMemory;
    const int blocks = kMostThreads / cut.threads;
    // With more blocks than multiprocessors, two of them share one, and scores that leave no room for the other are
    // read again instead.
    constexpr int kReserved = 1024;  // of a multiprocessor's shared memory for each block: CUDA programming guide, 9.0
    int memory = device.shared_memory;
    if (int64_t{cut.team} * batch > device.multiprocessors) memory = (memory + kReserved) / blocks - kReserved;
    const int staging = cut.slim ? kSlimMemory : kFullMemory;
    const int64_t end = staging + int64_t{4} * (cut.threads / 32) * cut.per_warp;
    if (needs.greedy || end > memory) return cut;
    cut.staging = staging;
    cut.bytes = std::max(cut.bytes, static_cast<int>(end));
    return cut;
}

cudaError_t launch_sample(const SampleParams& params, const SampleCut& cut, const dijiang_device& device, bool overlap,
                          cudaStream_t stream) {
    const cudaError_t error = allow_memory(device);
    if (error != cudaSuccess) return error;
    Launch launch(params.buffers.batch, cut.team, cut.threads, cut.bytes);
    launch.config.stream = stream;
    if (overlap) {
        launch.attributes[launch.config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        launch.attributes[launch.config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    return cudaLaunchKernelEx(&launch.config, sample_kernel, params, cut);
}

}  // namespace dijiang
