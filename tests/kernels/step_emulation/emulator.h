// CUDA threads on a host, as far as the step kernel needs them: every thread is a fibre, which runs until it has to wait
// for another. No clocks, no caches, no memory model: what it finds is wrong indices, missing barriers and deadlocks.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

namespace emulator {

struct Barrier {
    int waiting = 0;
    unsigned generation = 0;
};
struct Warp {
    Barrier barrier;
    uint32_t words[2][32][8];
};
struct Block {
    Barrier all, consumers;
    std::vector<Warp> warps;
    uint8_t* shared;
};
struct Fibre {
    ucontext_t context;  // how it begins
    jmp_buf place;       // and where it waits: unlike swapcontext, a jump is no system call
    bool begun = false;
    std::unique_ptr<char[]> stack;
    uint3 thread, block;
    Block* of = nullptr;
    bool done = false;
    unsigned parity = 0;
};
inline Fibre* current = nullptr;
inline jmp_buf scheduler;
inline dim3 grid, block_size;
inline uint64_t progress = 0;  // counts what lets somebody go on
inline const std::function<void()>* body = nullptr;

inline void yield() {
    if (_setjmp(current->place) == 0) _longjmp(scheduler, 1);
}
__attribute__((noinline)) inline void resume(Fibre& fibre) {
    current = &fibre;
    if (_setjmp(scheduler) != 0) return;
    if (fibre.begun) _longjmp(fibre.place, 1);
    fibre.begun = true;
    setcontext(&fibre.context);
}
template <typename Ready> void wait_until(Ready ready) {
    while (!ready()) yield();
    ++progress;
}
inline void meet(Barrier& barrier, int threads) {
    const unsigned mine = barrier.generation;
    ++progress;
    if (++barrier.waiting == threads) {
        barrier.waiting = 0;
        ++barrier.generation;
        return;
    }
    wait_until([&] { return barrier.generation != mine; });
}
inline Warp& warp() { return current->of->warps[current->thread.x / 32]; }
// Every lane leaves words and sees the others'. Two buffers take turns, so one barrier is enough.
inline uint32_t (*exchange(const uint32_t* mine, int count))[8] {
    Warp& w = warp();
    auto* words = w.words[current->parity ^= 1];
    std::memcpy(words[current->thread.x % 32], mine, 4 * count);
    meet(w.barrier, 32);
    return words;
}
inline void start() {
    (*body)();
    current->done = true;
    ++progress;
    _longjmp(scheduler, 1);
}

// Runs a kernel. Returns false if nobody can go on.
inline bool run(dim3 blocks, dim3 threads, size_t shared_bytes, const std::function<void()>& kernel) {
    constexpr size_t kStack = 96 * 1024;
    grid = blocks;
    block_size = threads;
    body = &kernel;
    std::vector<Block> all(blocks.x);
    std::vector<std::unique_ptr<Fibre>> fibres;
    std::vector<std::unique_ptr<uint8_t[]>> memory;
    for (unsigned b = 0; b < blocks.x; ++b) {
        memory.emplace_back(new uint8_t[shared_bytes + 128]);
        std::memset(memory.back().get(), 0xff, shared_bytes + 128);  // NaN in every type
        all[b].shared = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(memory.back().get()) + 127) / 128 * 128);
        all[b].warps.resize(threads.x / 32);
        for (unsigned t = 0; t < threads.x; ++t) {
            fibres.emplace_back(new Fibre);
            Fibre& f = *fibres.back();
            f.stack.reset(new char[kStack]);
            f.thread = {t, 0, 0};
            f.block = {b, 0, 0};
            f.of = &all[b];
            getcontext(&f.context);
            f.context.uc_stack.ss_sp = f.stack.get();
            f.context.uc_stack.ss_size = kStack;
            f.context.uc_link = nullptr;
            makecontext(&f.context, start, 0);
        }
    }
    // With EMULATED_ORDER, a number, warps and blocks rest now and then, another order for each number.
    const char* const order = std::getenv("EMULATED_ORDER");
    std::mt19937 random(order ? std::atoi(order) : 0);
    std::vector<int> rest(blocks.x, 0);
    size_t left = fibres.size();
    for (int idle = 0; left > 0; ++idle) {
        const uint64_t before = progress;
        for (int& passes : rest) passes = passes > 0 ? passes - 1 : order && random() % 4 == 0 ? random() % 20 : 0;
        bool rests = false;
        for (auto& f : fibres) {
            if (order && f->thread.x % 32 == 0) rests = rest[f->block.x] > 0 || random() % 3 == 0;
            if (f->done || rests) continue;
            resume(*f);
            left -= f->done;
        }
        if (progress != before) idle = 0;
        if (idle > 100) return false;
    }
    return true;
}

}  // namespace emulator

#define threadIdx (emulator::current->thread)
#define blockIdx (emulator::current->block)
#define gridDim (emulator::grid)
#define blockDim (emulator::block_size)
#undef __launch_bounds__
#define __launch_bounds__(...)
#define __grid_constant__
#define __global__

template <typename T> T __ldg(const T* p) { return *p; }
template <typename T> T __ldcg(const T* p) { return *p; }
inline uint32_t __float_as_uint(float x) { uint32_t u; std::memcpy(&u, &x, 4); return u; }
inline float __uint_as_float(uint32_t u) { float x; std::memcpy(&x, &u, 4); return x; }
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t select) {
    const uint64_t both = uint64_t{high} << 32 | low;
    uint32_t made = 0;
    for (int i = 0; i < 4; ++i) made |= static_cast<uint32_t>(both >> (8 * (select >> (4 * i) & 7)) & 0xff) << (8 * i);
    return made;
}
inline float __fmul_rn(float x, float y) { volatile float z = x * y; return z; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
template <typename T> T __shfl_xor_sync(unsigned, T v, int offset) {
    uint32_t word;
    std::memcpy(&word, &v, 4);
    auto* words = emulator::exchange(&word, 1);
    std::memcpy(&v, words[threadIdx.x % 32 ^ offset], 4);
    return v;
}
template <typename T> T __shfl_sync(unsigned, T v, int lane) {
    uint32_t word;
    std::memcpy(&word, &v, 4);
    std::memcpy(&v, emulator::exchange(&word, 1) + lane % 32, 4);
    return v;
}
template <typename T> T __shfl_down_sync(unsigned, T v, int offset) {
    uint32_t word;
    std::memcpy(&word, &v, 4);
    auto* words = emulator::exchange(&word, 1);
    const unsigned lane = threadIdx.x % 32;
    std::memcpy(&v, words[lane + offset < 32 ? lane + offset : lane], 4);
    return v;
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __ballot_sync(unsigned, bool vote) {
    const uint32_t word = vote;
    auto* words = emulator::exchange(&word, 1);
    unsigned all = 0;
    for (int lane = 0; lane < 32; ++lane) all |= words[lane][0] << lane;
    return all;
}
inline void __syncwarp() { emulator::meet(emulator::warp().barrier, 32); }
inline void __syncthreads() { emulator::meet(emulator::current->of->all, static_cast<int>(blockDim.x)); }
inline unsigned atomicInc(unsigned* p, unsigned most) {
    const unsigned old = *p;
    *p = old >= most ? 0 : old + 1;
    ++emulator::progress;
    return old;
}
template <typename T> T min(T x, T y) { return x < y ? x : y; }
template <typename T> T max(T x, T y) { return x < y ? y : x; }
inline void __threadfence() {}
#define __shared__ static
