// The instructions that blocks of a step talk to memory and to each other with. tests/kernels/step_emulation.h has the
// same in C++, so that the kernel can be followed on a host.
#pragma once

#include <cstdint>

#ifdef DIJIANG_EMULATED
#include "step_emulation.h"
#else

#include "device/copies.cuh"
#include "device/mma.cuh"
#include "step/step.h"

// Bulk copies, and what came with them: compute capability 9.0. The step kernel alone looks at this.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define DIJIANG_STEP_BULK 0
#else
#define DIJIANG_STEP_BULK 1
#endif

namespace dijiang {
namespace step {

__device__ __forceinline__ uint8_t* shared_memory() {
    extern __shared__ __align__(128) uint8_t step_shared_memory[];
    return step_shared_memory;
}
// The warps that multiply meet.
__device__ __forceinline__ void meet() { asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory"); }

// --- mbarriers ---
__device__ __forceinline__ void mbarrier_init(uint64_t* m, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(m)), "r"(count) : "memory");
}
__device__ __forceinline__ void mbarriers_ready() {
#if DIJIANG_STEP_BULK
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* m) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(m)) : "memory");
}
__device__ __forceinline__ bool mbarrier_done(uint64_t* m, uint32_t parity) {
    uint32_t done;
#if DIJIANG_STEP_BULK
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
#else
    asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
#endif
                 : "=r"(done) : "r"(shared_address(m)), "r"(parity) : "memory");
    return done;
}

// --- a flag in shared memory that one thread sets and others look at, whenever they do ---
__device__ __forceinline__ void set_flag(uint32_t* flag, uint32_t value) {
    asm volatile("{\n.reg .b32 old;\natom.relaxed.cta.shared::cta.exch.b32 old, [%0], %1;\n}" ::"r"(shared_address(flag)), "r"(value)
                 : "memory");
}
__device__ __forceinline__ bool flag(uint32_t* flag) {
    uint32_t value;
    asm volatile("atom.relaxed.cta.shared::cta.or.b32 %0, [%1], 0;" : "=r"(value) : "r"(shared_address(flag)) : "memory");
    return value != 0;
}

// --- copies ---
// How L2 should keep what a step reads once: rather than this, states and slots.
__device__ __forceinline__ uint64_t read_once() {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
// `bytes` and all addresses are multiples of 16. With bulk copies one thread copies, and the barrier of one arrival hears of
// the bytes when they are there. Without, a warp's lanes do, 16 bytes each at a time, and the barrier is of 32 arrivals.
#if DIJIANG_STEP_BULK
constexpr int kCopiers = 1;
__device__ __forceinline__ void copy_piece(uint8_t* to, const uint8_t* from, uint32_t bytes, uint64_t* m, uint64_t policy) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(m)), "r"(bytes) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
                 ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(m)), "l"(policy) : "memory");
}
#else
constexpr int kCopiers = 32;
__device__ __forceinline__ void copy_piece(uint8_t* to, const uint8_t* from, uint32_t bytes, uint64_t* m, uint64_t policy) {
    const uint32_t shared = shared_address(to);
#pragma unroll 4
    for (uint32_t at = threadIdx.x % 32 * 16; at < bytes; at += 32 * 16)
        asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(shared + at), "l"(from + at), "l"(policy)
                     : "memory");
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(m)) : "memory");
}
#endif
// Has what is there brought to L2: a line, or so many bytes by a warp. A bulk prefetch would wait behind all bulk copies that
// are under way.
__device__ __forceinline__ void prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from) : "memory"); }
__device__ __forceinline__ void prefetch(const uint8_t* from, uint32_t bytes) {
    for (uint32_t at = threadIdx.x % 32 * 128; at < bytes; at += 32 * 128) prefetch(from + at);
}

// Four matrices of 8 x 8, a row of them from each lane, transposed.
__device__ __forceinline__ void load_transposed(uint32_t (&r)[4], const void* row) { ldmatrix_trans(r, shared_address(row)); }

// --- slots: 8 or 16 bytes at once, by all of the GPU's blocks ---
__device__ __forceinline__ void put(uint2* slot, uint32_t value, uint32_t tag) {
    asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(slot), "l"(uint64_t{tag} << 32 | value) : "memory");
}
__device__ __forceinline__ void put(uint4* slot, uint32_t x, uint32_t y, uint32_t z, uint32_t tag) {
    asm volatile("{\n.reg .b128 v;\nmov.b128 v, {%1, %2};\nst.relaxed.gpu.global.b128 [%0], v;\n}" ::"l"(slot),
                 "l"(uint64_t{y} << 32 | x), "l"(uint64_t{tag} << 32 | z) : "memory");
}
__device__ __forceinline__ uint2 look(const uint2* slot) {
    uint64_t v;
    asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(v) : "l"(slot) : "memory");
    return make_uint2(static_cast<uint32_t>(v), static_cast<uint32_t>(v >> 32));
}
// Two neighbouring slots; each is whole.
__device__ __forceinline__ uint4 look_at_two(const uint2* slots) {
    uint64_t a, b;
    asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];" : "=l"(a), "=l"(b) : "l"(slots) : "memory");
    return make_uint4(static_cast<uint32_t>(a), static_cast<uint32_t>(a >> 32), static_cast<uint32_t>(b),
                      static_cast<uint32_t>(b >> 32));
}
__device__ __forceinline__ uint4 look(const uint4* slot) {
    uint64_t a, b;
    asm volatile("{\n.reg .b128 v;\nld.relaxed.gpu.global.b128 v, [%2];\nmov.b128 {%0, %1}, v;\n}"
                 : "=l"(a), "=l"(b) : "l"(slot) : "memory");
    return make_uint4(static_cast<uint32_t>(a), static_cast<uint32_t>(a >> 32), static_cast<uint32_t>(b),
                      static_cast<uint32_t>(b >> 32));
}

// Has the compiler keep a value in a register instead of finding it again in every layer.
template <typename U> __device__ __forceinline__ U kept(U value) {
    static_assert(sizeof(U) == 4, "a register");
    uint32_t& bits = reinterpret_cast<uint32_t&>(value);
    asm volatile("" : "+r"(bits));
    return value;
}

// Waits until ready() says so. All blocks are resident, so it comes; should this program be wrong, the launch ends after
// some seconds with an error instead of never.
constexpr uint32_t kMostTries = 1u << 25;
template <typename Ready> __device__ __forceinline__ void await(Ready ready) {
    bool good;
    uint32_t tries = 0;
#pragma unroll 1
    do {
        good = ready();
        if (++tries == kMostTries) __trap();
    } while (!good);
}

}  // namespace step
}  // namespace dijiang
#endif
