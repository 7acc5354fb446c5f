// How a TensorRT 8.6 plan keeps DijiangStep: little-endian words, whatever the machine.
//
//   0  magic "DJTS", format version (1)
//   8  layers, hidden, inner, vocabulary, num_heads, num_kv_heads, head_dim, rotary_dim, dtype, norm, activation,
//      parallel_residual, table_rows, position_rows, position_offset, rows, blocks, weight_formats
//  80  norm_epsilon, group_norm_epsilon (the bits of float32)
//  88  end
#pragma once

#include <cstddef>
#include <string>

#include "step/attributes.h"

namespace dijiang::trt::step {

constexpr size_t kBlobSize = 88;
constexpr size_t blob_size(const Attributes&) { return kBlobSize; }

// Writes kBlobSize bytes.
void write_blob(const Attributes& attributes, unsigned char* bytes);

// "" or why these bytes are no such blob; reads nothing outside them.
std::string read_blob(const void* bytes, size_t size, Attributes& attributes);

}  // namespace dijiang::trt::step
