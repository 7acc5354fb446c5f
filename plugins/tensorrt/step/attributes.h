// What a DijiangStep layer carries besides its tensors. No TensorRT header here.
#pragma once

#include <cstddef>
#include <string>

#include "dijiang/step.h"

namespace dijiang::trt::step {

constexpr char kName[] = "DijiangStep";

// The fields of docs/tensorrt-plugin.md.
struct Attributes {
    dijiang_step_model model{};
    int32_t rows = 0;    // of the largest call
    int32_t blocks = 0;  // that the weights are packed for, which the device's multiprocessors decide
};

constexpr int32_t kIntegers = 18, kReals = 2;

// The attributes in the order of the fields and of the blob. `reserved` is where formats of weights have their place.
template <typename A>
auto integers(A& a) {
    auto& m = a.model;
    struct {
        decltype(&m.layers) at[kIntegers];
    } it{{&m.layers, &m.hidden, &m.inner, &m.vocabulary, &m.num_heads, &m.num_kv_heads, &m.head_dim, &m.rotary_dim,
        &m.dtype, &m.norm, &m.activation, &m.parallel_residual, &m.table_rows, &m.position_rows, &m.position_offset,
        &a.rows, &a.blocks, &m.reserved}};
    return it;
}
template <typename A>
auto reals(A& a) {
    struct {
        decltype(&a.model.norm_epsilon) at[kReals];
    } it{{&a.model.norm_epsilon, &a.model.group_norm_epsilon}};
    return it;
}

// "" if the kernel can do such a model for so many rows on some GPU, else what is wrong with it. Asks no GPU.
std::string why_unsupported(const Attributes& attributes);

// Bytes of the packed weights, the same whatever the number of blocks; of attributes that are supported.
std::string packed_bytes(const Attributes& attributes, size_t& bytes);

// One line, the same for equal attributes.
std::string describe(const Attributes& attributes);

}  // namespace dijiang::trt::step
