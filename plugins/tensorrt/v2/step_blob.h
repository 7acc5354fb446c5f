// How a TensorRT 8.6 plan keeps DijiangStep: little-endian words, whatever the machine.
//
//   0  magic "DJTS", format version: 1, or where matrices are quantised 1 + DIJIANG_STEP_PACKING
//   8  layers, hidden, inner, vocabulary, num_heads, num_kv_heads, head_dim, rotary_dim, dtype, norm, activation,
//      parallel_residual, table_rows, position_rows, position_offset, rows, blocks
//  76  how many weight_formats follow: 0, or 2 + layers
//  80  norm_epsilon, group_norm_epsilon (the bits of float32)
//  88  weight_formats
#pragma once

#include <cstddef>
#include <string>

#include "step/attributes.h"

namespace dijiang::trt::step {

constexpr size_t kBlobSize = 88;  // but for weight_formats

inline int32_t kept_formats(const Attributes& attributes) { return attributes.formats == 1 ? 0 : attributes.formats; }
inline size_t blob_size(const Attributes& attributes) {
    return kBlobSize + 4 * static_cast<size_t>(kept_formats(attributes));
}

// Writes blob_size(attributes) bytes.
void write_blob(const Attributes& attributes, unsigned char* bytes);

// "" or why these bytes are no such blob; reads nothing outside them.
std::string read_blob(const void* bytes, size_t size, Attributes& attributes);

}  // namespace dijiang::trt::step
