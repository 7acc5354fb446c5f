// What a DijiangStep layer carries besides its tensors. No TensorRT header here.
#pragma once

#include <cstddef>
#include <string>

#include "dijiang/step.h"

namespace dijiang::trt::step {

constexpr char kName[] = "DijiangStep";

// Formats of the weights of a quantised model: the head's, the embedding's, then of each layer which matrices are int8.
constexpr int32_t kMostFormats = 2 + DIJIANG_STEP_MAX_LAYERS;

// The fields of docs/tensorrt-plugin.md.
struct Attributes {
    dijiang_step_model model{};
    int32_t rows = 0;    // of the largest call
    int32_t blocks = 0;  // that the weights are packed for, which the device's multiprocessors decide
    // As nodes and plans have them, and the model too: 2 + layers, or where matrices are T a single 0.
    int32_t formats = 1;
    int32_t weight_formats[kMostFormats] = {};
    int32_t packing = DIJIANG_STEP_PACKING;  // of quantised weights in a plan
};

constexpr int32_t kIntegers = 17, kReals = 2;

// The attributes but for weight_formats and packing, in the order of the fields and of the blob.
template <typename A>
auto integers(A& a) {
    auto& m = a.model;
    struct {
        decltype(&m.layers) at[kIntegers];
    } it{{&m.layers, &m.hidden, &m.inner, &m.vocabulary, &m.num_heads, &m.num_kv_heads, &m.head_dim, &m.rotary_dim,
        &m.dtype, &m.norm, &m.activation, &m.parallel_residual, &m.table_rows, &m.position_rows, &m.position_offset,
        &a.rows, &a.blocks}};
    return it;
}
template <typename A>
auto reals(A& a) {
    struct {
        decltype(&a.model.norm_epsilon) at[kReals];
    } it{{&a.model.norm_epsilon, &a.model.group_norm_epsilon}};
    return it;
}

// Tells the model what weight_formats says. "" or why that cannot be.
std::string take_formats(Attributes& attributes);

// "" if the kernel can do such a model for so many rows on some GPU, else what is wrong with it. Asks no GPU.
std::string why_unsupported(const Attributes& attributes);

// Bytes of the packed weights, the same whatever the number of blocks; of attributes that are supported.
std::string packed_bytes(const Attributes& attributes, size_t& bytes);

// One line, the same for equal attributes.
std::string describe(const Attributes& attributes);

}  // namespace dijiang::trt::step
