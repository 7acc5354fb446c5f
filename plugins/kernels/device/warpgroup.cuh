// What compute capability 9.0 has for groups of four warps: products of 64 rows with operands in shared memory
// (wgmma), barriers in shared memory, and registers that warps hand to each other. Needs code for sm_90a.
#pragma once

#include "device/tiles.cuh"

namespace dijiang {

template <typename T, int N> struct Wgmma;

#define DIJIANG_NAME___half "f16"
#define DIJIANG_NAME___nv_bfloat16 "bf16"
#define DIJIANG_ACC1(i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define DIJIANG_ACC4(i) DIJIANG_ACC1(i), DIJIANG_ACC1(i + 1), DIJIANG_ACC1(i + 2), DIJIANG_ACC1(i + 3)
// The first so many operands: c's.
#define DIJIANG_C8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define DIJIANG_C16 DIJIANG_C8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define DIJIANG_C32 DIJIANG_C16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define DIJIANG_C40 DIJIANG_C32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define DIJIANG_C64 \
    DIJIANG_C40 ", %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define DIJIANG_C128 \
    DIJIANG_C64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, " \
    "%88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// Wgmma<T, N>: c [64, N] = a [64, 16] b [16, N] (+ c if `add`), float32. Warp w of the four holds rows 16 w to 16 w +
// 15 of c, and of a in registers, as mma.cuh's fragments. Operands in shared memory are named by descriptors
// (tiles.cuh); kTransA, kTransB: 0 if its 16 inner elements are neighbours in a row of the tile, 1 if the 64 or N
// outer ones are. Here C is c's operands, the numbers are those behind them, and the last ones c's constraints.
#define DIJIANG_WGMMA(TYPE, N, C, ADD) \
    "{\n.reg .pred p;\nsetp.ne.b32 p, %" #ADD ", 0;\n" \
    "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." DIJIANG_NAME_##TYPE "." DIJIANG_NAME_##TYPE " {" C "}, "
#define DIJIANG_SHARED(TYPE, N, C, A, B, ADD, TRANS_A, TRANS_B, ...) \
    template <int kTransA, int kTransB> \
    static __device__ __forceinline__ void shared(float (&c)[N / 8][4], uint64_t a, uint64_t b, int add) { \
        asm volatile(DIJIANG_WGMMA(TYPE, N, C, ADD) "%" #A ", %" #B ", p, 1, 1, %" #TRANS_A ", %" #TRANS_B ";\n}" \
                     : __VA_ARGS__ : "l"(a), "l"(b), "r"(add), "n"(kTransA), "n"(kTransB)); \
    }
#define DIJIANG_REGISTERS(TYPE, N, C, A0, A1, A2, A3, B, ADD, TRANS_B, ...) \
    template <int kTransB> \
    static __device__ __forceinline__ void registers(float (&c)[N / 8][4], uint32_t a0, uint32_t a1, uint32_t a2, \
                                                     uint32_t a3, uint64_t b, int add) { \
        asm volatile(DIJIANG_WGMMA(TYPE, N, C, ADD) \
                     "{%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", p, 1, 1, %" #TRANS_B ";\n}" \
                     : __VA_ARGS__ : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(add), "n"(kTransB)); \
    }
#define DIJIANG_EACH_WGMMA(TYPE) \
    template <> struct Wgmma<TYPE, 16> { \
        DIJIANG_SHARED(TYPE, 16, DIJIANG_C8, 8, 9, 10, 11, 12, DIJIANG_ACC1(0), DIJIANG_ACC1(1)) \
    }; \
    template <> struct Wgmma<TYPE, 32> { \
        DIJIANG_REGISTERS(TYPE, 32, DIJIANG_C16, 16, 17, 18, 19, 20, 21, 22, DIJIANG_ACC4(0)) \
    }; \
    template <> struct Wgmma<TYPE, 64> { \
        DIJIANG_SHARED(TYPE, 64, DIJIANG_C32, 32, 33, 34, 35, 36, DIJIANG_ACC4(0), DIJIANG_ACC4(4)) \
        DIJIANG_REGISTERS(TYPE, 64, DIJIANG_C32, 32, 33, 34, 35, 36, 37, 38, DIJIANG_ACC4(0), DIJIANG_ACC4(4)) \
    }; \
    template <> struct Wgmma<TYPE, 80> { \
        DIJIANG_SHARED(TYPE, 80, DIJIANG_C40, 40, 41, 42, 43, 44, DIJIANG_ACC4(0), DIJIANG_ACC4(4), DIJIANG_ACC1(8), \
                       DIJIANG_ACC1(9)) \
        DIJIANG_REGISTERS(TYPE, 80, DIJIANG_C40, 40, 41, 42, 43, 44, 45, 46, DIJIANG_ACC4(0), DIJIANG_ACC4(4), \
                          DIJIANG_ACC1(8), DIJIANG_ACC1(9)) \
    }; \
    template <> struct Wgmma<TYPE, 128> { \
        DIJIANG_SHARED(TYPE, 128, DIJIANG_C64, 64, 65, 66, 67, 68, DIJIANG_ACC4(0), DIJIANG_ACC4(4), DIJIANG_ACC4(8), \
                       DIJIANG_ACC4(12)) \
        DIJIANG_REGISTERS(TYPE, 128, DIJIANG_C64, 64, 65, 66, 67, 68, 69, 70, DIJIANG_ACC4(0), DIJIANG_ACC4(4), \
                          DIJIANG_ACC4(8), DIJIANG_ACC4(12)) \
    }; \
    template <> struct Wgmma<TYPE, 256> { \
        DIJIANG_SHARED(TYPE, 256, DIJIANG_C128, 128, 129, 130, 131, 132, DIJIANG_ACC4(0), DIJIANG_ACC4(4), \
                       DIJIANG_ACC4(8), DIJIANG_ACC4(12), DIJIANG_ACC4(16), DIJIANG_ACC4(20), DIJIANG_ACC4(24), \
                       DIJIANG_ACC4(28)) \
    };
DIJIANG_EACH_WGMMA(__half)
DIJIANG_EACH_WGMMA(__nv_bfloat16)
#undef DIJIANG_EACH_WGMMA
#undef DIJIANG_REGISTERS
#undef DIJIANG_SHARED
#undef DIJIANG_WGMMA
#undef DIJIANG_C128
#undef DIJIANG_C64
#undef DIJIANG_C40
#undef DIJIANG_C32
#undef DIJIANG_C16
#undef DIJIANG_C8
#undef DIJIANG_ACC4
#undef DIJIANG_ACC1
#undef DIJIANG_NAME___nv_bfloat16
#undef DIJIANG_NAME___half

// Before the first product of a batch: registers are as the products shall find them.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// After the last.
__device__ __forceinline__ void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// All batches but the last kPending are done.
template <int kPending> __device__ __forceinline__ void await_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// What this thread wrote to shared memory will be seen by products that start after a barrier.
__device__ __forceinline__ void show_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Four 8x8 blocks of 16-bit elements, as ldmatrix reads them.
__device__ __forceinline__ void stmatrix(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
}

// Barriers in shared memory, of 8 bytes each. Their phases have the parities 0, 1, 0, …
__device__ __forceinline__ void make_barrier(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void arrive_at(uint32_t barrier) {
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}" ::"r"(barrier) : "memory");
}
// Until the last phase of this parity has ended; parity 1 of a new barrier is taken to have.
__device__ __forceinline__ void await_phase(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        // At most 10 ms asleep, rather than ask again and again.
        "again:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1, 10000000;\n@!done bra again;\n}" ::"r"(
            barrier),
        "r"(parity)
        : "memory");
}
// Whether any of `threads` at this barrier says so.
__device__ __forceinline__ bool any_of(int id, int threads, bool mine) {
    int any;
    asm volatile(
        "{\n.reg .pred mine, any;\nsetp.ne.b32 mine, %3, 0;\n"
        "barrier.cta.red.or.pred any, %1, %2, mine;\nselp.b32 %0, 1, 0, any;\n}"
        : "=r"(any)
        : "r"(id), "r"(threads), "r"(static_cast<int>(mine))
        : "memory");
    return any != 0;
}

// All warps of a group: its share of the block's registers.
template <int kMost> __device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kMost));
}
template <int kMost> __device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kMost));
}

// A word that another block waits for.
__device__ __forceinline__ void store_release(unsigned* to, unsigned value) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}
__device__ __forceinline__ unsigned load_acquire(const unsigned* from) {
    unsigned value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
    return value;
}

__device__ __forceinline__ char* block_memory() {
    extern __shared__ __align__(1024) char memory[];
    return memory;
}

}  // namespace dijiang
