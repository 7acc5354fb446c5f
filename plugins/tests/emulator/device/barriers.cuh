#pragma once
#include <map>

#include "cuda_on_cpu.h"
namespace dijiang {
inline void barrier_sync(int id, int threads) {
    emulator::Meeting& meeting = emulator::block->named[id];
    meeting.members = threads;
    emulator::meet(meeting);
}
}  // namespace dijiang
