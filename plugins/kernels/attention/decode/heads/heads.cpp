#include "attention/decode/heads/heads.h"

#include <algorithm>

#include "host/device.h"
#include "host/launch.h"

namespace dijiang {
namespace decode {

HeadPlan plan_heads(const dijiang_geometry& g, int32_t batch, const dijiang_device& device) {
    HeadPlan plan = {};
    if (code_for(device.compute_capability) < 90) return plan;
    if (g.dtype != DIJIANG_FLOAT16 && g.dtype != DIJIANG_BFLOAT16) return plan;  // float32 has not been timed
    const HeadKernel kernel = g.dtype == DIJIANG_FLOAT16 ? head_kernel_f16(g.head_dim) : head_kernel_bf16(g.head_dim);
    if (kernel.function == nullptr) return plan;
    // A block's channels must be whole groups.
    const int32_t set = set_heads(g.num_heads, g.head_dim);
    if (set > kernel.most_heads || (set > 1 && kernel.splits > 1)) return plan;
    if (kernel.splits > 1 && g.head_dim / kernel.splits % g.num_heads != 0) return plan;
    const int64_t blocks = int64_t{batch} * (g.num_heads / set) * kernel.splits;
    const int32_t memory = set * kernel.head_memory;
    if (blocks > INT32_MAX || memory > device.shared_memory) return plan;
    plan.kernel = kernel;
    plan.cut = {set, g.num_heads / set, g.num_heads / g.num_kv_heads, 1.0f / static_cast<float>(g.num_heads)};
    plan.blocks = static_cast<int32_t>(blocks);
    plan.threads = set * kernel.head_threads;
    plan.memory = plan.spread_memory = memory;
    // Blocks start while the kernel ahead, such as this one for another layer, still runs. Where all find a place, but
    // not beside as many others, they would crowd on the multiprocessors that are free first, and those would end last.
    // Shared memory keeps them apart.
    constexpr int32_t kReserved = 1024;  // of each block, by CUDA
    const int64_t share = (blocks - 1) / device.multiprocessors + 1, room = device.shared_memory + kReserved;
    const int64_t places = std::min<int64_t>(room / (memory + kReserved), kernel.blocks / set);
    if (share < places && places < 2 * share)
        plan.spread_memory = static_cast<int32_t>(room / share - kReserved) / 16 * 16;
    return plan;
}

cudaError_t launch_heads(const HeadPlan& plan, const AttentionParams& params, const dijiang_device& device,
                         bool overlap, cudaStream_t stream) {
    const int32_t cluster = plan.kernel.splits, clusters = plan.blocks / cluster;
    int32_t memory = plan.spread_memory;
    if (cluster > 1 && memory != plan.memory) {
        // Clusters live inside one group of multiprocessors: kept apart, not all may find a place.
        int32_t at_once = 0;
        const int32_t share = (plan.blocks - 1) / device.multiprocessors + 1;
        const Work work = {plan.kernel.function, cluster, plan.threads, share, memory, clusters};
        const cudaError_t status = prepare(work, device, at_once);
        if (status != cudaSuccess) return status;
        if (at_once < clusters) memory = plan.memory;
    }
    const LaunchShape shape = {dim3(static_cast<unsigned>(plan.blocks)), plan.threads, static_cast<size_t>(memory),
                               cluster, overlap};
    void* arguments[] = {const_cast<AttentionParams*>(&params), const_cast<HeadCut*>(&plan.cut)};
    return launch_kernel(plan.kernel.function, shape, arguments, stream);
}

}  // namespace decode
}  // namespace dijiang
