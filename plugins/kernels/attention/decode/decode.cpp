// Decode on the host: which kernel, how the work is cut, and the launch.
#include <algorithm>
#include <map>
#include <mutex>
#include <numeric>
#include <tuple>

#include "attention/decode/cut.h"
#include "attention/decode/heads/heads.h"
#include "host/device.h"
#include "host/launch.h"

namespace dijiang {
namespace decode {

namespace {

constexpr int32_t kMostClusterBlocks = 8;  // what every GPU with clusters can do
constexpr int32_t kLeastWidth = 16;        // columns of a block of the stream kernel: 64 bytes of a row

constexpr int64_t kManyBytes = 32 * 1024;  // of state a multiprocessor, from where wide slices are faster

// Blocks of that much shared memory that a multiprocessor holds at once.
int32_t fitting_blocks(const dijiang_device& device, int32_t shared_memory) {
    constexpr int32_t kReserved = 1024;  // of each block, by CUDA
    return (device.shared_memory + kReserved) / (shared_memory + kReserved);
}

SliceKernel slice_kernel(const dijiang_geometry& geometry, bool many) {
    switch (geometry.dtype) {
        case DIJIANG_FLOAT16: return slice_kernel_f16(geometry.head_dim, many);
        case DIJIANG_BFLOAT16: return slice_kernel_bf16(geometry.head_dim, many);
        default: return slice_kernel_f32(geometry.head_dim, many);
    }
}

// The slice kernel for this geometry, batch and GPU, or none.
SliceKernel slice_kernel(const dijiang_geometry& geometry, int32_t batch, const dijiang_device& device) {
    if (code_for(device.compute_capability) < 90) return {};
    const int64_t head_bytes = int64_t{4} * geometry.head_dim * geometry.head_dim;
    const bool many = batch * geometry.num_heads * head_bytes > device.multiprocessors * kManyBytes;
    SliceKernel kernel = slice_kernel(geometry, many);
    if (kernel.all_shared_memory > device.shared_memory) kernel = slice_kernel(geometry, false);
    if (kernel.all_shared_memory > device.shared_memory) return {};
    kernel.blocks_per_sm = std::min(kernel.blocks_per_sm, fitting_blocks(device, kernel.all_shared_memory));
    return kernel;
}

Work slice_work(const SliceKernel& kernel, const SliceCut& cut) {
    return {kernel.function,      cut.heads * cut.splits, kernel.threads,
            kernel.blocks_per_sm, kernel.shared_memory,   cut.items};
}

int32_t stream_blocks_per_sm(const dijiang_device& device, int32_t shared_memory) {
    const int32_t fitting = fitting_blocks(device, shared_memory + kStreamStaticMemory);
    return std::max(1, std::min(kStreamBlocksPerSm, fitting));
}

Work stream_work(const dijiang_geometry& geometry, const StreamCut& cut, const dijiang_device& device) {
    const int32_t memory = stream_shared_memory(geometry.dtype, geometry.head_dim, cut.resident != 0);
    const int32_t blocks = stream_blocks_per_sm(device, memory);
    return {stream_kernel(geometry.dtype), 1, kStreamThreads, blocks, memory, cut.items};
}

// Clusters that the GPU holds at once if nothing is known but its size.
int32_t expected_clusters(const Work& work, const dijiang_device& device) {
    return std::max(1, device.multiprocessors * work.blocks_per_sm / work.cluster);
}

const char* name(Norm norm) {
    switch (norm) {
        case Norm::block: return "block";
        case Norm::cluster: return "cluster";
        default: return "memory";
    }
}

}  // namespace

cudaError_t prepare(const Work& work, const dijiang_device& device, int32_t& clusters) {
    static std::mutex mutex;
    static std::map<std::tuple<int, const void*, int32_t, int32_t>, int32_t> known;
    int ordinal = 0;
    cudaError_t status = cudaGetDevice(&ordinal);
    if (status != cudaSuccess) return status;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto key = std::make_tuple(ordinal, work.function, work.cluster, work.shared_memory);
    const auto found = known.find(key);
    if (found != known.end()) {
        clusters = found->second;
        return cudaSuccess;
    }
    status = allow_shared_memory(work.function, work.shared_memory);
    if (status != cudaSuccess) return status;
    clusters = expected_clusters(work, device);
    if (work.cluster > 1) {
        // Clusters live inside one group of multiprocessors, so that fewer may fit than blocks alone would.
        cudaLaunchConfig_t config = {};
        config.gridDim = dim3(clusters * work.cluster);
        config.blockDim = dim3(work.threads);
        config.dynamicSmemBytes = work.shared_memory;
        cudaLaunchAttribute attribute = {};
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim = {static_cast<unsigned>(work.cluster), 1, 1};
        config.attrs = &attribute;
        config.numAttrs = 1;
        int active = 0;
        status = cudaOccupancyMaxActiveClusters(&active, work.function, &config);
        if (status != cudaSuccess) return status;
        if (active > 0) clusters = std::min(clusters, active);
    }
    known.emplace(key, clusters);
    return cudaSuccess;
}

int32_t set_heads(int32_t num_heads, int32_t head_dim) { return num_heads / std::gcd(num_heads, head_dim); }

SliceCut cut_slices(const dijiang_geometry& g, int32_t batch, const SliceKernel& kernel) {
    SliceCut cut = {};
    cut.splits = g.head_dim / kernel.width;
    cut.set_heads = set_heads(g.num_heads, g.head_dim);
    cut.sharing = divisor(g.num_heads / g.num_kv_heads);
    cut.channels = divisor(g.num_heads);
    cut.inverse_channels = 1.0f / static_cast<float>(g.num_heads);
    cut.heads = 1;
    if (cut.set_heads == 1 && kernel.width % g.num_heads == 0) {
        cut.norm = Norm::block;
    } else if (cut.set_heads * cut.splits <= kMostClusterBlocks) {
        cut.norm = Norm::cluster;
        cut.heads = cut.set_heads;
    } else {
        cut.norm = Norm::memory;
    }
    cut.items = batch * (g.num_heads / cut.heads);
    cut.items_per_row = divisor(g.num_heads / cut.heads);
    return cut;
}

StreamCut cut_stream(const dijiang_geometry& g, int32_t batch, const dijiang_device& device) {
    StreamCut cut = {};
    cut.set_heads = set_heads(g.num_heads, g.head_dim);
    cut.norm = cut.set_heads == 1 ? Norm::block : Norm::memory;
    // More blocks for few heads, as long as their columns hold whole groups if the heads do.
    const int32_t units = batch * g.num_heads;
    const auto divides = [&](int32_t splits) {
        const int32_t width = g.head_dim / splits;
        return g.head_dim % (4 * splits) == 0 && width >= kLeastWidth &&
               (cut.norm != Norm::block || width % g.num_heads == 0);
    };
    cut.splits = 1;
    while (2 * cut.splits * units <= device.multiprocessors && divides(2 * cut.splits)) cut.splits *= 2;
    cut.items = units * cut.splits;
    // Keeping P pays for itself from the second item of a block on.
    const int32_t memory = stream_shared_memory(g.dtype, g.head_dim, true);
    cut.resident = memory + kStreamStaticMemory <= device.shared_memory &&
                   cut.items > device.multiprocessors * stream_blocks_per_sm(device, memory);
    return cut;
}

cudaError_t enqueue(const Work& work, const AttentionParams& params, const void* cut,
                    const dijiang_device& device, bool overlap, cudaStream_t stream) {
    int32_t clusters = 0;
    const cudaError_t status = prepare(work, device, clusters);
    if (status != cudaSuccess) return status;
    const dim3 grid(static_cast<unsigned>(std::min(clusters, work.items) * work.cluster));
    const LaunchShape shape = {grid, work.threads, static_cast<size_t>(work.shared_memory), work.cluster, overlap};
    void* arguments[] = {const_cast<AttentionParams*>(&params), const_cast<void*>(cut)};
    return launch_kernel(work.function, shape, arguments, stream);
}

Needs needs(const dijiang_geometry& g, int32_t max_batch, const dijiang_device& device) {
    // Who normalises depends on the batch only through the kernel for few heads or for many.
    bool in_memory = false;
    for (const int32_t batch : {1, max_batch}) {
        const SliceKernel kernel = slice_kernel(g, batch, device);
        const bool slices = kernel.function != nullptr;
        const Norm norm = slices ? cut_slices(g, batch, kernel).norm : cut_stream(g, batch, device).norm;
        in_memory = in_memory || norm == Norm::memory;
    }
    if (!in_memory) return {0, 0};
    const size_t rows = static_cast<size_t>(max_batch);
    const size_t sets = static_cast<size_t>(g.num_heads / set_heads(g.num_heads, g.head_dim));
    return {rows * g.num_heads * g.head_dim * sizeof(float), rows * sets * sizeof(uint32_t)};
}

std::string describe(const dijiang_geometry& g, int32_t batch, const dijiang_device& device) {
    const HeadPlan heads = plan_heads(g, batch, device);
    if (heads.kernel.function != nullptr)
        return "decode heads splits=" + std::to_string(heads.kernel.splits) + " heads=" +
               std::to_string(heads.cut.set_heads) + " ctas=" + std::to_string(heads.blocks) +
               " threads=" + std::to_string(heads.threads) + " memory=" + std::to_string(heads.spread_memory);
    const SliceKernel kernel = slice_kernel(g, batch, device);
    const bool slices = kernel.function != nullptr;
    Work work;
    Norm norm;
    int32_t splits;
    if (slices) {
        const SliceCut cut = cut_slices(g, batch, kernel);
        work = slice_work(kernel, cut);
        norm = cut.norm;
        splits = cut.splits;
    } else {
        const StreamCut cut = cut_stream(g, batch, device);
        work = stream_work(g, cut, device);
        norm = cut.norm;
        splits = cut.splits;
    }
    const int32_t blocks = std::min(expected_clusters(work, device), work.items) * work.cluster;
    return std::string("decode ") + (slices ? "slice" : "stream") + " splits=" + std::to_string(splits) +
           " cluster=" + std::to_string(work.cluster) + " ctas=" + std::to_string(blocks) +
           " threads=" + std::to_string(work.threads) + " norm=" + name(norm);
}

cudaError_t launch(int32_t dtype, const AttentionParams& p, const dijiang_device& device,
                   cudaStream_t stream) {
    const dijiang_geometry g = {p.num_heads, p.num_kv_heads, p.head_dim, p.rotary_dim,
                                dtype,       p.table_rows,   p.epsilon,  0};
    const bool overlap = can_overlap(device);
    const HeadPlan heads = plan_heads(g, p.batch, device);
    if (heads.kernel.function != nullptr) return launch_heads(heads, p, device, overlap, stream);
    const SliceKernel kernel = slice_kernel(g, p.batch, device);
    if (kernel.function != nullptr) {
        const SliceCut cut = cut_slices(g, p.batch, kernel);
        return enqueue(slice_work(kernel, cut), p, &cut, device, overlap, stream);
    }
    const StreamCut cut = cut_stream(g, p.batch, device);
    return enqueue(stream_work(g, cut, device), p, &cut, device, overlap, stream);
}

}  // namespace decode
}  // namespace dijiang
