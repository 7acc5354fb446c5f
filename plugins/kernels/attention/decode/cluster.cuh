// What blocks of a thread-block cluster (compute capability 9.0 and up) say to each other, in PTX.
#pragma once

#include <cstdint>

#include "device/copies.cuh"

namespace dijiang {
namespace decode {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// This block's place in its cluster, the cluster's place in the grid, and how many clusters there are.
__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t value;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(value));
    return value;
}
__device__ __forceinline__ uint32_t cluster_index() {
    uint32_t value;
    asm("mov.u32 %0, %%clusterid.x;" : "=r"(value));
    return value;
}
__device__ __forceinline__ uint32_t cluster_count() {
    uint32_t value;
    asm("mov.u32 %0, %%nclusterid.x;" : "=r"(value));
    return value;
}

// The two halves of a barrier over the cluster. Its only use is at the start: nobody may write to a block
// that does not run yet, or whose mbarriers are not published.
__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
                 : "memory");
}
__device__ __forceinline__ void mbarrier_publish() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// This phase of the barrier ends when `bytes` have been sent to this block.
__device__ __forceinline__ void mbarrier_expect(uint64_t* barrier, uint32_t bytes) {
    const uint32_t address = shared_address(barrier);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
    uint32_t done;
    do {
        asm volatile(
            "{\n\t.reg .pred p;\n\t"
            "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n\t"
            "selp.u32 %0, 1, 0, p;\n\t}"
            : "=r"(done)
            : "r"(shared_address(barrier)), "r"(parity)
            : "memory");
    } while (done == 0);
}

// The address of `mine` in the shared memory of the block with that rank.
__device__ __forceinline__ uint32_t address_at(const void* mine, uint32_t rank) {
    uint32_t address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(mine)), "r"(rank));
    return address;
}

// Store into another block's shared memory; its mbarrier counts the bytes as they arrive.
__device__ __forceinline__ void send(uint32_t address, float value, uint32_t barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];"
                 :
                 : "r"(address), "f"(value), "r"(barrier)
                 : "memory");
}
__device__ __forceinline__ void send(uint32_t address, float2 value, uint32_t barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];"
                 :
                 : "r"(address), "f"(value.x), "f"(value.y), "r"(barrier)
                 : "memory");
}

#endif

}  // namespace decode
}  // namespace dijiang
