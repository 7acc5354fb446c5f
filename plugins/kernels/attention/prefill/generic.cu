#include "attention/prefill/launch.h"
#include "attention/prefill/norm.cuh"

namespace dijiang::prefill {
namespace {

template <typename T> cudaError_t generic(const AttentionParams& p, const Schedule& schedule, cudaStream_t stream) {
    const int d = p.head_dim;
    const size_t feature_shared = feature_shared_bytes(d), scan_shared = scan_shared_bytes(d);
    cudaError_t status = allow_shared_memory(reinterpret_cast<const void*>(features_kernel<T>), feature_shared);
    if (status == cudaSuccess)
        status = allow_shared_memory(reinterpret_cast<const void*>(scan_kernel<T>), scan_shared);
    if (status != cudaSuccess) return status;
    char* workspace = static_cast<char*>(p.workspace);
    float* features = reinterpret_cast<float*>(workspace + schedule.features);
    float* raw = reinterpret_cast<float*>(workspace + schedule.outputs);
    const dim3 feature_grid((p.length + kFeatureRows - 1) / kFeatureRows, p.num_heads + p.num_kv_heads, p.batch);
    features_kernel<T><<<feature_grid, kGenericThreads, feature_shared, stream>>>(p, features);
    const dim3 scan_grid((d + kScanColumns - 1) / kScanColumns, p.num_heads, p.batch);
    scan_kernel<T><<<scan_grid, kGenericThreads, scan_shared, stream>>>(p, features, raw);
    status = cudaGetLastError();
    return status == cudaSuccess ? launch_norm<T>(p, raw, stream) : status;
}

}  // namespace

cudaError_t launch_generic(int32_t dtype, const AttentionParams& p, const Schedule& schedule, cudaStream_t stream) {
    switch (dtype) {
        case DIJIANG_FLOAT32: return generic<float>(p, schedule, stream);
        case DIJIANG_FLOAT16: return generic<__half>(p, schedule, stream);
        default: return generic<__nv_bfloat16>(p, schedule, stream);
    }
}

cudaError_t launch_norm(int32_t dtype, const AttentionParams& p, const float* raw, cudaStream_t stream) {
    switch (dtype) {
        case DIJIANG_FLOAT32: return launch_norm<float>(p, raw, stream);
        case DIJIANG_FLOAT16: return launch_norm<__half>(p, raw, stream);
        default: return launch_norm<__nv_bfloat16>(p, raw, stream);
    }
}

}  // namespace dijiang::prefill
