#pragma once
#include "cuda_on_cpu.h"
namespace dijiang {
inline int opaque(int x) { return x; }
inline int fresh_thread() { return emulator::block->current; }
template <typename T> void keep_before(T&) {}
inline int fresh_lane() { return emulator::block->current % 32; }
}  // namespace dijiang
