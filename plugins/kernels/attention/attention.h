// What the C ABI hands to the kernels, after every argument was checked: plain data, no defaults left.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "dijiang/kernels.h"

namespace dijiang {

// One call of DijiangAttention. Strides are in elements and never 0; everything else as in dijiang/kernels.h.
struct AttentionParams {
    int32_t batch, length;
    int32_t num_heads, num_kv_heads, head_dim, rotary_dim;
    int32_t table_rows;  // 0: geometric
    float epsilon;
    const void* qkv;
    const void* gate;
    const float* past_state;
    const int32_t* positions;
    const int32_t* seq_lens;
    const float* proj;
    const float* norm_weight;
    const float* norm_bias;
    const float* inv_freq;
    const float* log_decay;
    const float* gain;
    const float* read_scale;
    void* output;
    float* present_state;
    int64_t qkv_batch_stride, qkv_token_stride;
    int64_t gate_batch_stride, gate_token_stride;
    int64_t output_batch_stride, output_token_stride;
    int64_t past_batch_stride, present_batch_stride;
    void* workspace;
    uint32_t* sync;
};

struct Needs {
    size_t workspace;  // bytes
    size_t sync;       // bytes
};

// Each of the two families of kernels answers the same four questions. Geometry, batch and length are valid
// when they are called. `needs` is monotone: what it says for (B, L) is enough for every smaller B and L.
// `launch` only enqueues; it returns what the CUDA runtime said. `describe` is for people and tests.
namespace decode {  // length == 1, in one launch
Needs needs(const dijiang_geometry&, int32_t max_batch, const dijiang_device&);
std::string describe(const dijiang_geometry&, int32_t batch, const dijiang_device&);
cudaError_t launch(int32_t dtype, const AttentionParams&, const dijiang_device&, cudaStream_t);
}  // namespace decode

namespace prefill {  // any length >= 1
Needs needs(const dijiang_geometry&, int32_t max_batch, int32_t max_length, const dijiang_device&);
std::string describe(const dijiang_geometry&, int32_t batch, int32_t length, const dijiang_device&);
cudaError_t launch(int32_t dtype, const AttentionParams&, const dijiang_device&, cudaStream_t);
}  // namespace prefill

}  // namespace dijiang
