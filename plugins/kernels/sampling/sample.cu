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

cudaError_t ask_teams(const dijiang_device& device, SampleTeams& teams) {
    cudaError_t error = allow_memory(device);
    if (error != cudaSuccess) return error;
    error = cudaFuncSetAttribute(sample_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return error;
    for (int bits = 1; bits < SampleTeams::kSizes; ++bits) {
        const Launch launch(1, 1 << bits, kLeastThreads, device.shared_memory);  // no two blocks on a multiprocessor
        if (cudaOccupancyMaxActiveClusters(&teams.rows[bits], sample_kernel, &launch.config) == cudaSuccess) continue;
        cudaGetLastError();  // such clusters are not for this GPU
        teams.rows[bits] = 0;
    }
    return cudaSuccess;
}

// A block's dynamic shared memory where two share a multiprocessor, each with some that is the system's: CUDA
// programming guide, 9.0.
int half_of_memory(const dijiang_device& device) {
    constexpr int kReserved = 1024;
    return (device.shared_memory + kReserved) / 2 - kReserved;
}

// The threads of a block and the blocks of a row. Times of all of them: docs/evidence/sampling-cuts-h100.txt.
void shape(SampleCut& cut, int32_t batch, int32_t vocabulary, const dijiang_device& device, const SampleTeams& teams) {
    constexpr int kEnough = 2048;   // ids for a block; fewer do not pay for another one
    constexpr int kMany = 1 << 15;  // from more on, what is done once by each warp is little beside its ids
    int bits = 0;
    while (bits + 1 < SampleTeams::kSizes && teams.rows[bits + 1] >= batch && vocabulary >> bits > kEnough) ++bits;
    cut.team = 1 << bits;
    // Two blocks of few threads, of a row each, on a multiprocessor.
    const bool shared = batch > device.multiprocessors && half_of_memory(device) >= kFullMemory;
    cut.threads = vocabulary >> bits <= kMany && (bits > 0 || shared) ? kLeastThreads : kMostThreads;
}

}  // namespace

SampleTeams SampleTeams::guess(const dijiang_device& device) {
    SampleTeams teams{};
    for (int bits = 1; has_clusters(device) && 1 << bits <= kPortableTeam; ++bits)
        teams.rows[bits] = device.multiprocessors >> bits;
    return teams;
}

cudaError_t sample_teams(const dijiang_device& device, SampleTeams& teams) {
    constexpr int kRemembered = 64;  // devices; those beyond are asked every time
    static std::mutex mutex;
    static struct {
        bool asked;
        SampleTeams teams;
    } known[kRemembered];
    teams = {};
    if (!has_clusters(device)) return cudaSuccess;
    int index = 0;
    const cudaError_t error = cudaGetDevice(&index);
    if (error != cudaSuccess) return error;
    if (index >= kRemembered) return ask_teams(device, teams);
    const std::lock_guard<std::mutex> lock(mutex);
    if (!known[index].asked) {
        const cudaError_t asked = ask_teams(device, known[index].teams);
        if (asked != cudaSuccess) return asked;
        known[index].asked = true;
    }
    teams = known[index].teams;
    return cudaSuccess;
}

SampleCut cut_sample(int32_t batch, int32_t vocabulary, const dijiang_device& device, const SampleTeams& teams,
                     const SampleNeeds& needs) {
    SampleCut cut{kMostThreads, 1, 0, 0, 0, false};
    shape(cut, batch, vocabulary, device, teams);
    cut.per_warp = 32 * ((vocabulary - 1) / (cut.threads * cut.team) + 1);
    cut.slim = !needs.filters || are_few(needs.top_k, cut.threads * cut.team);
    cut.bytes = needs.filters ? kFullMemory : kSlimMemory;
    // With more blocks than multiprocessors, those of few threads share one, and scores that leave no room for the
    // other are read again instead. With fewer each gets one of its own, by as much memory as no two can have: blocks
    // of a cluster may share one otherwise, and leave another idle.
    const int half = half_of_memory(device);
    const bool shared = int64_t{cut.team} * batch > device.multiprocessors && cut.threads == kLeastThreads;
    if (!shared && cut.team > 1) cut.bytes = std::max(cut.bytes, half + 16);
    const int staging = cut.slim ? kSlimMemory : kFullMemory;
    const int64_t end = staging + int64_t{4} * (cut.threads / 32) * cut.per_warp;
    if (needs.greedy || end > (shared ? half : device.shared_memory)) return cut;
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
