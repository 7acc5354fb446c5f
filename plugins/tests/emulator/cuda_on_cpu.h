// Blocks of CUDA threads on a CPU, one after the other: each thread is a fiber that runs until it meets a barrier.
//
// For tests of what a kernel computes, where there is no GPU. Included before a kernel's own headers, with this folder
// before theirs: device/ here has what PTX does there. It finds wrong indices and missing waits for copies, which arrive
// as late as they may; it does not find races between threads that no barrier parts, but the order of the fibers may be
// turned around.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <vector>

namespace emulator {

constexpr size_t kStack = 64 << 10;
constexpr size_t kSharedMemory = 228 << 10;
inline unsigned char* shared_memory = nullptr;  // kSharedMemory bytes

struct Copy {
    uint32_t to;
    const void* from;
    bool there;
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<unsigned char[]> stack;
    bool done = false;
    std::vector<Copy> open;                // copies of no group yet
    std::deque<std::vector<Copy>> groups;  // and those that are under way
};

// Threads that wait for each other: a block, or a warp.
struct Meeting {
    int members = 0, arrived = 0;
    uint64_t turn = 0;
};

struct Block {
    std::vector<Fiber> fibers;
    Meeting all;
    std::vector<Meeting> warps;
    std::map<int, Meeting> named;  // barriers of some of the threads
    std::vector<uint32_t> words;  // of each thread, 8: what it shows its warp
    ucontext_t main;
    int current = 0;
    dim3 index, size;
    unsigned char* shared = nullptr;  // its shared memory
    uint32_t rank = 0;                // in its cluster
};
inline Block* block = nullptr;

// Addresses in shared memory have the block's number in its cluster above bit 24, as on compute capability 9.0.
inline uint32_t address_of(uint32_t offset) { return offset | (block == nullptr ? 0 : block->rank) << 24; }
inline uint32_t offset_of(uint32_t address) {
    if (address >> 24 != block->rank) std::abort();  // another block's
    return address & 0xffffff;
}

// The blocks of a cluster, which run at the same time, and all their threads.
inline std::vector<std::unique_ptr<Block>> cluster;
inline Meeting all_of_cluster;
inline dim3 grid;  // of the blocks that run one after the other

inline void yield() {
    Fiber& it = block->fibers[static_cast<size_t>(block->current)];
    swapcontext(&it.context, &block->main);
}

inline void meet(Meeting& meeting) {
    const uint64_t turn = meeting.turn;
    if (++meeting.arrived == meeting.members) {
        meeting.arrived = 0;
        ++meeting.turn;
        return;
    }
    while (meeting.turn == turn) yield();
}
inline void meet_warp() { meet(block->warps[static_cast<size_t>(block->current / 32)]); }

// Every lane's words, once all have shown theirs; `look` reads them.
template <typename Look> void exchange(const uint32_t* mine, int count, Look look) {
    std::copy(mine, mine + count, &block->words[static_cast<size_t>(8 * block->current)]);
    meet_warp();
    const uint32_t* const warp = &block->words[static_cast<size_t>(8 * (block->current / 32 * 32))];
    look([warp](int lane, int word) { return warp[8 * lane + word]; });
    meet_warp();
}

struct Index {
    unsigned x;
};
inline Index thread_index() { return {static_cast<unsigned>(block->current)}; }

inline std::function<void()>* body = nullptr;
inline void enter() {
    (*body)();
    block->fibers[static_cast<size_t>(block->current)].done = true;
    yield();
}

inline void prepare(Block& it, dim3 index, dim3 size, unsigned char* shared) {
    const int threads = static_cast<int>(size.x);
    it.fibers = std::vector<Fiber>(static_cast<size_t>(threads));
    it.all.members = threads;
    it.warps.resize(static_cast<size_t>(threads / 32));
    for (Meeting& warp : it.warps) warp.members = 32;
    it.words.resize(static_cast<size_t>(8 * threads));
    it.index = index;
    it.size = size;
    it.shared = shared;
    std::memset(shared, 0xff, kSharedMemory);  // NaN, whatever the type
    for (Fiber& fiber : it.fibers) {
        fiber.stack.reset(new unsigned char[kStack]);  // not zeroed: there are thousands
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStack;
        fiber.context.uc_link = &it.main;
        makecontext(&fiber.context, enter, 0);
    }
}

// Lets each thread run until it waits; how many have not ended.
inline int run_once(Block& it, bool backwards) {
    const int threads = static_cast<int>(it.fibers.size());
    int left = 0;
    block = &it;
    shared_memory = it.shared;
    for (int i = 0; i < threads; ++i) {
        it.current = backwards ? threads - 1 - i : i;
        Fiber& fiber = it.fibers[static_cast<size_t>(it.current)];
        if (fiber.done) continue;
        swapcontext(&it.main, &fiber.context);
        if (!fiber.done) ++left;
    }
    block = nullptr;
    return left;
}

// One block. backwards: the last thread is the first to run.
inline void run_block(dim3 index, dim3 size, std::function<void()> kernel, bool backwards) {
    Block it;
    body = &kernel;
    prepare(it, index, size, shared_memory);
    while (run_once(it, backwards) > 0) {}
}

// Blocks `first` to first + count - 1 as a cluster, with kSharedMemory bytes each at `shared`.
inline void run_cluster(unsigned first, int count, dim3 size, unsigned char* shared, std::function<void()> kernel,
                        bool backwards) {
    body = &kernel;
    all_of_cluster = {count * static_cast<int>(size.x), 0, 0};
    for (int rank = 0; rank < count; ++rank) {
        cluster.push_back(std::make_unique<Block>());
        prepare(*cluster.back(), {first + static_cast<unsigned>(rank), 1, 1}, size,
                shared + static_cast<size_t>(rank) * kSharedMemory);
        cluster.back()->rank = static_cast<uint32_t>(rank);
    }
    for (int left = 1; left > 0;) {
        left = 0;
        for (int i = 0; i < count; ++i)
            left += run_once(*cluster[static_cast<size_t>(backwards ? count - 1 - i : i)], backwards);
    }
    cluster.clear();
}

}  // namespace emulator

#define threadIdx (::emulator::thread_index())
#define blockIdx (::emulator::block->index)
#define blockDim (::emulator::block->size)
#define gridDim (::emulator::grid)
#undef __launch_bounds__
#define __launch_bounds__(...)
#ifndef __noinline__
#define __noinline__
#endif

inline void __syncthreads() { emulator::meet(emulator::block->all); }
inline int __syncthreads_or(int mine) {
    static bool any = false;
    if (mine) any = true;
    __syncthreads();
    const bool said = any;
    __syncthreads();
    any = false;
    __syncthreads();
    return said;
}
inline void __syncwarp() { emulator::meet_warp(); }
#define __sincosf(x, s, c) ((void)(*(s) = std::sin(x), *(c) = std::cos(x)))
inline void __threadfence() {}
inline void __nanosleep(unsigned) { emulator::yield(); }
template <typename T> T __ldg(const T* at) { return *at; }
template <typename T> T __ldcg(const T* at) { return *at; }
template <typename T> void __stcg(T* at, T x) { *at = x; }
inline float __fdividef(float x, float y) { return x / y; }
inline float __shfl_xor_sync(unsigned, float x, int offset) {
    uint32_t word;
    std::memcpy(&word, &x, 4);
    const int lane = emulator::block->current % 32;
    float found = 0;
    emulator::exchange(&word, 1, [&](auto of) {
        const uint32_t theirs = of(lane ^ offset, 0);
        std::memcpy(&found, &theirs, 4);
    });
    return found;
}
inline uint32_t __shfl_sync(unsigned, uint32_t x, int lane) {
    uint32_t found = 0;
    emulator::exchange(&x, 1, [&](auto of) { found = of(lane, 0); });
    return found;
}
inline uint32_t __shfl_xor_sync(unsigned, uint32_t x, int offset) {
    return __shfl_sync(~0u, x, (emulator::block->current % 32) ^ offset);
}
inline uint32_t __shfl_up_sync(unsigned, uint32_t x, int by) {
    const int lane = emulator::block->current % 32;
    return __shfl_sync(~0u, x, lane < by ? lane : lane - by);
}
// All lanes' words made one by `combine`.
template <typename Combine> uint32_t __emulated_reduce(uint32_t x, Combine combine) {
    uint32_t all = x;
    emulator::exchange(&x, 1, [&](auto of) {
        all = of(0, 0);
        for (int lane = 1; lane < 32; ++lane) all = combine(all, of(lane, 0));
    });
    return all;
}
inline uint32_t __reduce_max_sync(unsigned, uint32_t x) {
    return __emulated_reduce(x, [](uint32_t a, uint32_t b) { return std::max(a, b); });
}
inline uint32_t __reduce_min_sync(unsigned, uint32_t x) {
    return __emulated_reduce(x, [](uint32_t a, uint32_t b) { return std::min(a, b); });
}
inline uint32_t __reduce_or_sync(unsigned, uint32_t x) {
    return __emulated_reduce(x, [](uint32_t a, uint32_t b) { return a | b; });
}
inline uint32_t __reduce_add_sync(unsigned, uint32_t x) {
    return __emulated_reduce(x, [](uint32_t a, uint32_t b) { return a + b; });
}
inline uint32_t __ballot_sync(unsigned, bool x) {
    return __reduce_or_sync(~0u, (x ? 1u : 0u) << (emulator::block->current % 32));
}
inline uint32_t atomicAdd(uint32_t* at, uint32_t more) {
    const uint32_t before = *at;
    *at += more;
    return before;
}
inline uint32_t atomicInc(uint32_t* at, uint32_t most) {
    const uint32_t before = *at;
    *at = before >= most ? 0 : before + 1;
    return before;
}
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline uint64_t __umul64hi(uint64_t x, uint64_t y) {
    return static_cast<uint64_t>(static_cast<unsigned __int128>(x) * y >> 64);
}
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline int __float2int_rz(float x) {  // the largest numbers stand for what is too large
    return x != x ? 0 : x >= 2147483648.0f ? INT32_MAX : x <= -2147483648.0f ? INT32_MIN : static_cast<int>(x);
}
inline uint64_t __float2ull_rn(float x) { return static_cast<uint64_t>(std::nearbyint(static_cast<double>(x))); }
inline uint32_t __float_as_uint(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline float __uint_as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t select) {
    const uint64_t both = uint64_t{high} << 32 | low;
    uint32_t made = 0;
    for (int i = 0; i < 4; ++i) made |= static_cast<uint32_t>(both >> (8 * (select >> (4 * i) & 7)) & 0xff) << (8 * i);
    return made;
}
using std::max;
using std::min;
