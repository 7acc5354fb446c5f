// SHA-256 (FIPS 180-4).
#pragma once

#include <cstddef>
#include <string>

namespace dijiang {

std::string sha256_hex(const void* data, size_t size);

}  // namespace dijiang
