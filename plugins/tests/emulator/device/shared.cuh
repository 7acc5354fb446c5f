#pragma once
#include "cuda_on_cpu.h"
namespace dijiang {
inline unsigned char* shared_bytes() { return emulator::block->shared; }
}  // namespace dijiang
