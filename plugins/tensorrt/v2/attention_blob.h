// A TensorRT 8.6 plan keeps a plugin as bytes. Little-endian, whatever the machine:
//
//    0  magic "DJTA"         16  head_dim       32  max_length
//    4  format version (1)   20  rotary_dim     36  end
//    8  num_heads            24  epsilon (the bits of a float32)
//   12  num_kv_heads         28  max_batch
#pragma once

#include <cstddef>
#include <string>

#include "attention/attributes.h"

namespace dijiang::trt::attention {

constexpr size_t kBlobSize = 36;
constexpr size_t blob_size(const Attributes&) { return kBlobSize; }

// Writes kBlobSize bytes.
void write_blob(const Attributes& attributes, unsigned char* bytes);

// "" or why these bytes are no such blob; reads nothing outside them.
std::string read_blob(const void* bytes, size_t size, Attributes& attributes);

}  // namespace dijiang::trt::attention
