// Tensor-core, asynchronous-copy and barrier instructions that sm_80 and everything later have.
//
// Fragments of m16n8k16 (g = lane / 4, c = 2 (lane % 4)); each register holds two neighbouring elements:
//   A [m, k]  a0: (g, c)  a1: (g + 8, c)  a2: (g, c + 8)  a3: (g + 8, c + 8)
//   B [k, n]  b0: (c, g)  b1: (c + 8, g)
//   C [m, n]  c0 c1: (g, c) (g, c + 1)    c2 c3: (g + 8, c) (g + 8, c + 1)
// So C packed in pairs is A of a product over n, and C^T's rows are B of a product over m's transpose.
#pragma once

#include "common.cuh"

namespace dijiang::prefill {

template <typename T> __device__ __forceinline__ uint32_t pack(float low, float high);
template <> __device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
    const __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
}
template <> __device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
}

template <typename T> __device__ __forceinline__ float2 unpack(uint32_t both);
template <> __device__ __forceinline__ float2 unpack<__half>(uint32_t both) {
    return __half22float2(*reinterpret_cast<const __half2*>(&both));
}
template <> __device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t both) {
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&both));
}

// Products of pairs, and the larger magnitudes of pairs.
template <typename T> struct Pair;
template <> struct Pair<__half> { using type = __half2; };
template <> struct Pair<__nv_bfloat16> { using type = __nv_bfloat162; };
template <typename T> __device__ __forceinline__ uint32_t multiply(uint32_t x, uint32_t y) {
    using P = typename Pair<T>::type;
    const P product = __hmul2(*reinterpret_cast<const P*>(&x), *reinterpret_cast<const P*>(&y));
    return *reinterpret_cast<const uint32_t*>(&product);
}
__device__ __forceinline__ uint32_t larger(uint32_t x, uint32_t y) {
    const __half2 most = __hmax2(__habs2(*reinterpret_cast<const __half2*>(&x)),
                                 __habs2(*reinterpret_cast<const __half2*>(&y)));
    return *reinterpret_cast<const uint32_t*>(&most);
}

template <typename T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void mma<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same number, but computed anew from here on: keeps what derives from it out of registers until it is needed.
__device__ __forceinline__ int opaque(int x) {
    asm volatile("" : "+r"(x));
    return x;
}
// This thread's number and lane, read anew so that nothing derived from them is kept in a register between two uses.
__device__ __forceinline__ int fresh_thread() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}
__device__ __forceinline__ int fresh_lane() {
    int lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    return lane;
}

// x is computed before the next barrier, not after it.
__device__ __forceinline__ void keep_before(uint32_t& x) { asm volatile("" : "+r"(x)); }

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
__device__ __forceinline__ void ldmatrix_trans(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// The address that this lane gives ldmatrix for a 16x16 block of rows of `pitch` elements of 2 bytes.
// by_row: blocks in the order (0,0) (8,0) (0,8) (8,8) as (row, column); otherwise (0,0) (0,8) (8,0) (8,8).
__device__ __forceinline__ uint32_t lane_by_row(int pitch) {
    const int lane = fresh_lane();
    return 2u * ((lane % 16) * pitch + lane / 16 * 8);
}
__device__ __forceinline__ uint32_t lane_by_column(int pitch) {
    const int lane = fresh_lane();
    return 2u * ((lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * 8);
}

// 16 bytes from device to shared memory; zeros if not `there`.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool there) {
    const int bytes = there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending> __device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// x / (1 + e^-x) with the approximate instructions: exact enough for what is rounded to 16 bits.
__device__ __forceinline__ float fast_silu(float x) { return x * reciprocal(1.0f + fast_exp2(-1.44269504f * x)); }

// Features are kept this much larger in float16, whose smallest normal number is 6e-5. A power of two.
template <typename T> constexpr float kFeatureUnit = 1.0f;
template <> inline constexpr float kFeatureUnit<__half> = 256.0f;

}  // namespace dijiang::prefill
