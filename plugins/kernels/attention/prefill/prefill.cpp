// The face of prefill: what it needs, what it would do, and doing it.
#include <algorithm>

#include "attention/prefill/launch.h"
#include "host/device.h"

namespace dijiang::prefill {

Needs needs(const dijiang_geometry& geometry, int32_t max_batch, int32_t max_length, const dijiang_device& device) {
    Needs most = {0, 0};
    // A smaller batch may be cut into more pieces, a longer sequence never into fewer.
    for (int batch = 1; batch <= max_batch; ++batch) {
        const Schedule schedule = make_schedule(geometry, batch, max_length, device);
        most.workspace = std::max(most.workspace, schedule.workspace);
        most.sync = std::max(most.sync, schedule.sync);
    }
    return most;
}

std::string describe(const dijiang_geometry& geometry, int32_t batch, int32_t length, const dijiang_device& device) {
    const Schedule schedule = make_schedule(geometry, batch, length, device);
    if (schedule.path == Path::generic) return "prefill generic float32: features, scan, norm";
    const char* name = schedule.path == Path::slices   ? "slices"
                       : schedule.path == Path::spans  ? "spans"
                       : schedule.path == Path::hopper ? "hopper"
                       : schedule.path == Path::wide   ? "wide"
                                                       : "fused";
    return std::string("prefill ") + name + " heads=" + std::to_string(schedule.set) + " segments=" + std::to_string(schedule.segments) + "x"
           + std::to_string(schedule.segment_chunks * kChunk) + " ctas=" + std::to_string(schedule.blocks)
           + " threads=" + std::to_string(schedule.threads) + " shared=" + std::to_string(schedule.shared)
           + (schedule.raw ? ", norm" : "");
}

cudaError_t launch(int32_t dtype, const AttentionParams& p, const dijiang_device& device, cudaStream_t stream) {
    dijiang_geometry geometry{};
    geometry.num_heads = p.num_heads;
    geometry.num_kv_heads = p.num_kv_heads;
    geometry.head_dim = p.head_dim;
    geometry.rotary_dim = p.rotary_dim;
    geometry.dtype = dtype;
    geometry.table_rows = p.table_rows;
    geometry.epsilon = p.epsilon;
    Schedule schedule = make_schedule(geometry, p.batch, p.length, device);
    schedule.overlap = can_overlap(device);
    if (schedule.path == Path::generic) return launch_generic(dtype, p, schedule, stream);
    const bool half = dtype == DIJIANG_FLOAT16;
    const int d = p.head_dim;
#ifdef DIJIANG_SM90A
    if (schedule.path == Path::slices)
        return (half ? launch_slices_256_f16 : launch_slices_256_bf16)(p, schedule, stream);
    if (schedule.path == Path::spans)
        return (half ? launch_spans_64_f16 : launch_spans_64_bf16)(p, schedule, stream);
    if (schedule.path == Path::hopper)
        return (d == 80 ? (half ? launch_hopper_80_f16 : launch_hopper_80_bf16)
                        : (half ? launch_hopper_128_f16 : launch_hopper_128_bf16))(p, schedule, stream);
#endif
    const auto fused = d <= 64   ? (half ? launch_fused_64_f16 : launch_fused_64_bf16)
                       : d <= 80 ? (half ? launch_fused_80_f16 : launch_fused_80_bf16)
                       : d <= 128 ? (half ? launch_fused_128_f16 : launch_fused_128_bf16)
                                  : (half ? launch_wide_256_f16 : launch_wide_256_bf16);
    const cudaError_t status = fused(p, schedule, stream);
    if (status != cudaSuccess || !schedule.raw) return status;
    const char* workspace = static_cast<const char*>(p.workspace);
    return launch_norm(dtype, p, reinterpret_cast<const float*>(workspace + schedule.outputs), stream);
}

}  // namespace dijiang::prefill
