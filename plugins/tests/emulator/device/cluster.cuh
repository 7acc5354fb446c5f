// A cluster of emulated blocks: see cuda_on_cpu.h.
#pragma once

#include "cuda_on_cpu.h"

namespace dijiang {

inline int cluster_block() {
    int rank = 0;
    while (emulator::cluster[static_cast<size_t>(rank)].get() != emulator::block) ++rank;
    return rank;
}
// Threads meet in the second half.
inline void appear_in_cluster() {}
inline void arrive_at_cluster() {}
inline void wait_for_cluster() { emulator::meet(emulator::all_of_cluster); }
template <typename T> T* in_block(T* shared, int rank) {
    const auto offset = reinterpret_cast<unsigned char*>(shared) - emulator::block->shared;
    if (offset < 0 || offset + sizeof(T) > emulator::kSharedMemory) std::abort();
    return reinterpret_cast<T*>(emulator::cluster[static_cast<size_t>(rank)]->shared + offset);
}

// An arrival: bytes that are still expected, and whether nobody has said yet how many.
struct Arrival {
    int32_t bytes, open;
};
inline Arrival& arrival_of(uint64_t* arrival) { return *reinterpret_cast<Arrival*>(arrival); }
inline void make_arrival(uint64_t* arrival) { arrival_of(arrival) = {0, 1}; }
inline void expect_arrival(uint64_t* arrival, uint32_t bytes) {
    if (arrival_of(arrival).open != 1) std::abort();
    arrival_of(arrival).bytes += static_cast<int32_t>(bytes);
    arrival_of(arrival).open = 0;
}
inline void await_arrival(uint64_t* arrival) {
    while (arrival_of(arrival).open != 0 || arrival_of(arrival).bytes != 0) {
        if (arrival_of(arrival).open == 0 && arrival_of(arrival).bytes < 0) std::abort();  // more than was expected
        emulator::yield();
    }
}
template <typename T> void send(T* to, const T& value, int rank, uint64_t* arrival) {
    *in_block(to, rank) = value;
    arrival_of(in_block(arrival, rank)).bytes -= static_cast<int32_t>(sizeof value);
}

}  // namespace dijiang
