// How a TensorRT 8.6 plan keeps DijiangLinear: little-endian words, whatever the machine.
//
//   0  magic "DJTL", format version (3), terms, outputs, dtype
//  20  workspace, term_output[4], term_bias[4], output_activation[4], output_norm[4], output_norm_bias[4],
//      output_residual[4], term_weight_format[4], output_width[4], output_epsilon[4] (the bits of float32); 0 beyond
//      the counts
// 168  end
#pragma once

#include <cstddef>
#include <string>

#include "linear/attributes.h"

namespace dijiang::trt::linear {

constexpr size_t kBlobSize = 168;
constexpr size_t blob_size(const Attributes&) { return kBlobSize; }

// Writes kBlobSize bytes.
void write_blob(const Attributes& attributes, unsigned char* bytes);

// "" or why these bytes are no such blob; reads nothing outside them.
std::string read_blob(const void* bytes, size_t size, Attributes& attributes);

}  // namespace dijiang::trt::linear
