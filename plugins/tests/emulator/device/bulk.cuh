// The bulk copy engine: copies that come when a barrier is waited for (warpgroup.cuh), or at once (emulator::eager).
#pragma once

#include "device/cluster.cuh"
#include "device/warpgroup.cuh"

namespace dijiang {

inline void expect_bytes(uint32_t barrier, uint32_t bytes) {
    emulator::phases_of(barrier).bytes += bytes;
    arrive_at(barrier);
}

inline void copy_bulk_to(emulator::Block* block, uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
    to = emulator::offset_of(to);
    const bool aligned = to % 16 == 0 && bytes % 16 == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0;
    if (!aligned || to + bytes > emulator::kSharedMemory) std::abort();
    emulator::Phases& it = emulator::phases_of(barrier, block);
    it.copies.push_back([=, &it] {
        std::memcpy(block->shared + to, from, bytes);
        it.bytes -= bytes;
    });
    if (emulator::eager) {
        it.copies.front()();
        it.copies.pop_front();
        it.settle();
    }
}
inline void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
    copy_bulk_to(emulator::block, to, from, bytes, barrier);
}
inline void copy_bulk_to_all(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, int blocks) {
    for (int rank = 0; rank < blocks; ++rank)
        copy_bulk_to(emulator::cluster.at(static_cast<size_t>(rank)).get(), to, from, bytes, barrier);
}

inline void copy_bulk_to_block(uint32_t from, uint32_t bytes, uint32_t barrier, int rank) {
    const unsigned char* const source = emulator::shared_memory + emulator::offset_of(from);
    copy_bulk_to(emulator::cluster.at(static_cast<size_t>(rank)).get(), from, source, bytes, barrier);
}

inline void arrive_in_block(uint32_t barrier, int rank) {
    emulator::Phases& it = emulator::phases_of(barrier, emulator::cluster.at(static_cast<size_t>(rank)).get());
    --it.left;
    it.settle();
}

inline void meet_async_reads() {}

}  // namespace dijiang
