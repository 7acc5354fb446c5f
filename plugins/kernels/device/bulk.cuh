// The bulk copy engine of compute capability 9.0: whole pieces of device memory to shared memory, of one block or of
// all of a cluster, whose bytes barriers in shared memory count (warpgroup.cuh). No address but the first is computed.
#pragma once

#include <cstdint>

namespace dijiang {

// An arrival that also lets the barrier's phase last until so many bytes more have arrived. They may come first.
__device__ __forceinline__ void expect_bytes(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// `bytes`, a multiple of 16, to this block. One thread does it, for all.
__device__ __forceinline__ void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}
// The same to the same place in the first `blocks` blocks of the cluster, each of whose barriers counts them.
__device__ __forceinline__ void copy_bulk_to_all(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier,
                                                 int blocks) {
    const auto mask = static_cast<uint16_t>((1 << blocks) - 1);
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], "
        "%4;" ::"r"(to),
        "l"(from), "r"(bytes), "r"(barrier), "h"(mask)
        : "memory");
}

// `bytes` of this block's shared memory to the same place in another block of the cluster, whose barrier counts them.
__device__ __forceinline__ void copy_bulk_to_block(uint32_t from, uint32_t bytes, uint32_t barrier, int rank) {
    asm volatile(
        "{\n.reg .b32 to, there;\nmapa.shared::cluster.u32 to, %0, %3;\nmapa.shared::cluster.u32 there, %2, %3;\n"
        "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [to], [%0], %1, [there];\n}" ::"r"(from),
        "r"(bytes), "r"(barrier), "r"(rank)
        : "memory");
}

// Arrives at the barrier at the same place in another block of the cluster, or in this one. It tells that memory has
// been read, no more: a release of what was written, to all blocks, would wait for memory outside them too.
__device__ __forceinline__ void arrive_in_block(uint32_t barrier, int rank) {
    asm volatile(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
        "r"(rank)
        : "memory");
}

// Between ordinary reads and writes, of whatever memory, and those of bulk copies and products.
__device__ __forceinline__ void meet_async_reads() { asm volatile("fence.proxy.async;" ::: "memory"); }

}  // namespace dijiang
