// The tensor-core instructions by their definitions in PTX's documentation.
#pragma once

#include "cuda_on_cpu.h"
#include "device/elements.cuh"

namespace dijiang {

template <typename T> void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const int lane = emulator::block->current % 32, g = lane / 4, t = lane % 4;
    const uint32_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
    emulator::exchange(words, 6, [&](auto of) {
        const auto element = [](uint32_t pair, int half) {
            const float2 both = unpack<T>(pair);
            return half == 0 ? both.x : both.y;
        };
        for (int i = 0; i < 4; ++i) {
            const int high = i / 2, column = 2 * t + i % 2;
            for (int k = 0; k < 16; ++k) {
                const int upper = k / 8, owner = k % 8 / 2;
                c[i] += element(of(4 * g + owner, high + 2 * upper), k % 2) *
                        element(of(4 * column + owner, 4 + upper), k % 2);
            }
        }
    });
}

inline void ldmatrix(uint32_t (&r)[4], uint32_t address) {
    const int lane = emulator::block->current % 32;
    if (address % 16 != 0) std::abort();
    emulator::exchange(&address, 1, [&](auto of) {
        for (int m = 0; m < 4; ++m)
            std::memcpy(&r[m], emulator::shared_memory + emulator::offset_of(of(8 * m + lane / 4, 0)) + 4 * (lane % 4), 4);
    });
}

inline void ldmatrix_trans(uint32_t (&r)[4], uint32_t address) {
    const int lane = emulator::block->current % 32;
    if (address % 16 != 0) std::abort();
    emulator::exchange(&address, 1, [&](auto of) {
        for (int m = 0; m < 4; ++m)
            for (int half = 0; half < 2; ++half)
                std::memcpy(reinterpret_cast<unsigned char*>(&r[m]) + 2 * half,
                            emulator::shared_memory + emulator::offset_of(of(8 * m + 2 * (lane % 4) + half, 0)) + 2 * (lane / 4), 2);
    });
}

inline uint32_t lane_by_row(int pitch) {
    const int lane = emulator::block->current % 32;
    return static_cast<uint32_t>(2 * (lane % 16 * pitch + lane / 16 * 8));
}

}  // namespace dijiang
