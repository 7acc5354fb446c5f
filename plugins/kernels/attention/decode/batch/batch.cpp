#include "attention/decode/batch/batch.h"

#include "host/device.h"
#include "host/launch.h"

namespace dijiang {
namespace decode {
BatchPlan plan_batch(const dijiang_geometry& g, int32_t batch, const dijiang_device& device) {
    BatchPlan plan = {};
    if (code_for(device.compute_capability) < 90) return plan;  // it has not been timed elsewhere
    if (g.dtype != DIJIANG_FLOAT16 && g.dtype != DIJIANG_BFLOAT16) return plan;  // float32 stays off tensor cores
    const int64_t heads = int64_t{batch} * g.num_heads, bytes = 4 * heads * g.head_dim * g.head_dim;
    const int64_t vectors = int64_t{batch} * (g.num_heads + g.num_kv_heads);
    if (heads > INT32_MAX / 8 || vectors > INT32_MAX / 8) return plan;
    const bool half = g.dtype == DIJIANG_FLOAT16;
    const BatchKernels kernels = half ? batch_kernels_f16(g.head_dim) : batch_kernels_bf16(g.head_dim);
    if (kernels.features == nullptr || kernels.feature_memory > device.shared_memory) return plan;
    if (bytes <= device.multiprocessors * kernels.least_bytes) return plan;
    // A block's channels must be whole groups.
    const int32_t set = set_heads(g.num_heads, g.head_dim), splits = g.head_dim / kernels.width;
    if (set > kernels.most_heads || (set > 1 && splits > 1)) return plan;
    if (splits > 1 && kernels.width % g.num_heads != 0) return plan;
    plan.kernels = kernels;
    plan.features = {static_cast<int32_t>(vectors), g.num_heads + g.num_kv_heads};
    plan.states = {splits, set, g.num_heads / set, g.num_heads / g.num_kv_heads, g.num_heads + g.num_kv_heads,
                   1.0f / static_cast<float>(g.num_heads)};
    plan.feature_blocks = static_cast<int32_t>((vectors + kernels.vectors - 1) / kernels.vectors) * kernels.slices;
    plan.state_blocks = static_cast<int32_t>(heads / set * splits);
    plan.state_threads = set * kernels.head_threads;
    plan.state_memory = set * kernels.head_memory;
    plan.workspace = 4 * vectors * (g.head_dim + (kernels.slices > 1 ? 2 * kernels.slices : 0));
    return plan;
}

cudaError_t launch_batch(const BatchPlan& plan, const AttentionParams& params, bool overlap, cudaStream_t stream) {
    const auto start = [&](const void* kernel, int32_t blocks, int32_t threads, int32_t memory, const void* cut) {
        const LaunchShape shape = {dim3(static_cast<unsigned>(blocks)), threads, static_cast<size_t>(memory), 1, overlap};
        void* arguments[] = {const_cast<AttentionParams*>(&params), const_cast<void*>(cut)};
        return launch_kernel(kernel, shape, arguments, stream);
    };
    const cudaError_t status = start(plan.kernels.features, plan.feature_blocks, plan.kernels.feature_threads,
                                     plan.kernels.feature_memory, &plan.features);
    if (status != cudaSuccess) return status;
    return start(plan.kernels.states, plan.state_blocks, plan.state_threads, plan.state_memory, &plan.states);
}

}  // namespace decode
}  // namespace dijiang
