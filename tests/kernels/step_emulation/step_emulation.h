// plugins/kernels/step/instructions.cuh in C++.
#pragma once

#include "device/elements.cuh"
#include "emulator.h"
#include "step/step.h"

namespace dijiang {
namespace step {

inline uint8_t* shared_memory() { return emulator::current->of->shared; }
inline void meet() { emulator::meet(emulator::current->of->consumers, kThreads); }

template <typename Ready> void await(Ready ready) { emulator::wait_until(ready); }

// count | pending << 16 | bytes << 32 | phase << 63
struct Mbarrier {
    uint64_t& word;
    unsigned count() const { return word & 0xffff; }
    unsigned pending() const { return word >> 16 & 0xffff; }
    unsigned bytes() const { return word >> 32 & 0x7fffffff; }
    void set(unsigned pending, unsigned bytes) const {
        uint64_t phase = word >> 63;
        if (pending == 0 && bytes == 0) phase ^= 1, pending = count();
        word = uint64_t{count()} | uint64_t{pending} << 16 | uint64_t{bytes} << 32 | phase << 63;
        ++emulator::progress;
    }
};
inline void mbarrier_init(uint64_t* m, int count) { *m = uint64_t(count) | uint64_t(count) << 16; }
inline void mbarriers_ready() {}
inline void mbarrier_arrive(uint64_t* m) {
    const Mbarrier it{*m};
    if (it.pending() == 0) std::abort();
    it.set(it.pending() - 1, it.bytes());
}
inline bool mbarrier_done(uint64_t* m, uint32_t parity) { return *m >> 63 != parity; }
inline void set_flag(uint32_t* flag, uint32_t value) { *flag = value; ++emulator::progress; }
inline bool flag(uint32_t* flag) { return *flag != 0; }
inline uint64_t read_once() { return 0; }
// One thread with bulk copies, or a warp's lanes. EMULATED_CAPABILITY says which.
inline int capability() {
    const char* const given = std::getenv("EMULATED_CAPABILITY");
    return given ? std::atoi(given) : 90;
}
inline int kCopiers = 1;
inline void copy_piece(uint8_t* to, const uint8_t* from, uint32_t bytes, uint64_t* m, uint64_t) {
    const Mbarrier it{*m};
    if (kCopiers == 1) {
        std::memcpy(to, from, bytes);
        return it.set(it.pending() - 1, it.bytes());
    }
    for (uint32_t at = threadIdx.x % 32 * 16; at < bytes; at += 512) std::memcpy(to + at, from + at, 16);
    mbarrier_arrive(m);
}
inline void prefetch(const uint8_t*, uint32_t) {}
inline void prefetch(const void* from) { (void)*static_cast<const volatile uint8_t*>(from); }  // a CUDA one may be anywhere

// Rows of 16 bytes, one from each lane: lane (g, t) has of matrix i elements (2 t, g) and (2 t + 1, g).
inline void load_transposed(uint32_t (&r)[4], const void* row) {
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) std::abort();
    uint32_t mine[4];
    std::memcpy(mine, row, 16);
    auto* words = emulator::exchange(mine, 4);
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
        const uint32_t low = words[8 * i + 2 * t][g / 2] >> (g % 2 * 16), high = words[8 * i + 2 * t + 1][g / 2] >> (g % 2 * 16);
        r[i] = (low & 0xffff) | high << 16;
    }
}

template <typename U> U kept(U value) { return value; }
inline void put(uint2* slot, uint32_t value, uint32_t tag) { *slot = make_uint2(value, tag); ++emulator::progress; }
inline void put(uint4* slot, uint32_t x, uint32_t y, uint32_t z, uint32_t tag) { *slot = make_uint4(x, y, z, tag); ++emulator::progress; }
inline uint2 look(const uint2* slot) { return *slot; }
inline uint4 look(const uint4* slot) { return *slot; }
inline uint4 look_at_two(const uint2* slots) { return make_uint4(slots[0].x, slots[0].y, slots[1].x, slots[1].y); }

}  // namespace step

// A sum as tensor cores make it: terms are cut off where the largest one's float32 ends, and so is the sum.
inline double cut_off(double x, double largest) {
    int exponent;
    std::frexp(largest, &exponent);
    return std::ldexp(std::trunc(std::ldexp(x, 24 - exponent)), exponent - 24);
}
// A [16, 16] row-major, B [16, 8] column-major, float32 sums: the fragments are those of plugins/kernels/device/mma.cuh.
template <typename T> void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const uint32_t mine[] = {a[0], a[1], a[2], a[3], b0, b1};
    auto* words = emulator::exchange(mine, 6);
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
        const int row = g + i / 2 * 8, column = 2 * t + i % 2;
        double terms[17], largest = std::fabs(terms[16] = c[i]), sum = 0;
        for (int k = 0; k < 16; ++k) {
            const float2 x = unpack<T>(words[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2]);
            const float2 y = unpack<T>(words[column * 4 + k % 8 / 2][4 + k / 8]);
            terms[k] = k % 2 ? double(x.y) * y.y : double(x.x) * y.x;
            largest = std::fmax(largest, std::fabs(terms[k]));
        }
        for (const double term : terms) sum += std::isfinite(term) ? cut_off(term, largest) : term;
        c[i] = static_cast<float>(std::isfinite(sum) ? cut_off(sum, sum) : sum);
    }
}

}  // namespace dijiang
