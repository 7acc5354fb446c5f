// What a DijiangAttention node carries besides its tensors, and what the plugin remembers. No TensorRT header
// here.
#pragma once

#include <cstdint>
#include <string>

#include "common/names.h"
#include "dijiang/kernels.h"

namespace dijiang::trt::attention {

constexpr const char* kName = kPluginName;

// The largest call that the optimisation profiles allow, as far as they were seen while the engine was built.
// It travels in the plan, so that an execution context can reserve its memory before the first call. 0:
// unknown.
struct Limits {
    int32_t max_batch = 0, max_length = 0;

    void include(int32_t batch, int32_t length) {
        if (batch > max_batch) max_batch = batch;
        if (length > max_length) max_length = length;
    }
};

// The op contract's attributes (docs/op-contract.md), and what only a plan has.
struct Attributes {
    int32_t num_heads = 0, num_kv_heads = 0, head_dim = 0, rotary_dim = 0;
    float epsilon = 0.0f;
    Limits limits;
};

// The C ABI's geometry of a layer of these attributes, with tensors of these types.
dijiang_geometry geometry_of(const Attributes& attributes, dijiang_dtype dtype, int32_t table_rows);

// "" if the kernels can do such a layer on some GPU and in some type, else why not.
std::string why_unsupported(const Attributes& attributes);

// One line, the same for equal attributes whatever the limits: "num_heads=12 num_kv_heads=12 ...".
std::string describe(const Attributes& attributes);

}  // namespace dijiang::trt::attention
