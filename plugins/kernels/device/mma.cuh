// Tensor-core instructions that sm_80 and everything later have.
//
// Fragments of m16n8k16 (g = lane / 4, c = 2 (lane % 4)); each register holds two neighbouring elements:
//   A [m, k]  a0: (g, c)  a1: (g + 8, c)  a2: (g, c + 8)  a3: (g + 8, c + 8)
//   B [k, n]  b0: (c, g)  b1: (c + 8, g)
//   C [m, n]  c0 c1: (g, c) (g, c + 1)    c2 c3: (g + 8, c) (g + 8, c + 1)
// So C packed in pairs is A of a product over n, and C^T's rows are B of a product over m's transpose.
#pragma once

#include "device/elements.cuh"
#include "device/registers.cuh"

namespace dijiang {

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

}  // namespace dijiang
