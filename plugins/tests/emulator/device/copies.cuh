// Copies that arrive when they are waited for, not before.
#pragma once

#include "cuda_on_cpu.h"

namespace dijiang {

inline uint32_t shared_address(const void* pointer) {
    const auto offset = static_cast<const unsigned char*>(pointer) - emulator::shared_memory;
    return emulator::address_of(static_cast<uint32_t>(offset));
}
inline emulator::Fiber& mine() { return emulator::block->fibers[static_cast<size_t>(emulator::block->current)]; }
inline void copy_async(uint32_t to, const void* from, bool there = true) {
    to = emulator::offset_of(to);
    if (to % 16 != 0 || to + 16 > emulator::kSharedMemory || reinterpret_cast<uintptr_t>(from) % 16 != 0) std::abort();
    mine().open.push_back({to, from, there});
}
inline void commit_copies() {
    mine().groups.push_back(mine().open);
    mine().open.clear();
}
template <int kPending> void wait_copies() {
    while (mine().groups.size() > kPending) {
        for (const emulator::Copy& copy : mine().groups.front()) {
            if (copy.there) std::memcpy(emulator::shared_memory + copy.to, copy.from, 16);
            else std::memset(emulator::shared_memory + copy.to, 0, 16);
        }
        mine().groups.pop_front();
    }
}

}  // namespace dijiang
