// The blocks of a thread block cluster (compute capability 9.0 and up): where they are, barriers, and stores into each
// other's shared memory that a barrier there counts. Elsewhere a block is alone.
//
// A barrier of the whole cluster waits until all of a block's stores are visible everywhere, which takes microseconds;
// counted stores wait for nothing but themselves.
#pragma once

#include "device/copies.cuh"

namespace dijiang {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

__device__ __forceinline__ int cluster_block() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return static_cast<int>(rank);
}

// The cluster's place in the grid, and how many there are.
__device__ __forceinline__ int cluster_index() {
    uint32_t index;
    asm("mov.u32 %0, %%clusterid.x;" : "=r"(index));
    return static_cast<int>(index);
}
__device__ __forceinline__ int cluster_count() {
    uint32_t count;
    asm("mov.u32 %0, %%nclusterid.x;" : "=r"(count));
    return static_cast<int>(count);
}

// What this thread made (make_arrival) can be sent to by all who know that it has appeared since.
__device__ __forceinline__ void publish_arrivals() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// The first half of a barrier that only says that the blocks run.
__device__ __forceinline__ void appear_without_arrivals() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
// The same, and that what their threads made can be sent to.
__device__ __forceinline__ void appear_in_cluster() {
    publish_arrivals();
    appear_without_arrivals();
}
// The two halves of a barrier for all threads of all blocks: what was written before the first half, to any block's
// shared memory, may be read after the second.
__device__ __forceinline__ void arrive_at_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void wait_for_cluster() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The same variable in the shared memory of another block, which must run by then.
template <typename T> __device__ __forceinline__ T* in_block(T* shared, int rank) {
    uint64_t address;
    asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(reinterpret_cast<uint64_t>(shared)), "r"(rank));
    return reinterpret_cast<T*>(address);
}

// A barrier that ends when as many bytes have been sent as are expected, and begins anew. One thread makes it and one
// says how many, before or after they arrive; that it is made must be known to the senders. Those who wait say for which
// end: an odd one (parity 0) or an even one.
__device__ __forceinline__ void make_arrival(uint64_t* arrival) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(arrival)) : "memory");
}
__device__ __forceinline__ void expect_arrival(uint64_t* arrival, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(arrival)), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void await_arrival(uint64_t* arrival) {  // the first time
    uint32_t done;
    do {
        asm volatile(
            "{\n\t.reg .pred p;\n\t"
            "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0;\n\t"
            "selp.u32 %0, 1, 0, p;\n\t}"
            : "=r"(done)
            : "r"(shared_address(arrival))
            : "memory");
    } while (done == 0);
}
__device__ __forceinline__ void await_arrival(uint64_t* arrival, uint32_t parity) {
    uint32_t done;
    do {
        asm volatile(
            "{\n\t.reg .pred p;\n\t"
            "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n\t"
            "selp.u32 %0, 1, 0, p;\n\t}"
            : "=r"(done)
            : "r"(shared_address(arrival)), "r"(parity)
            : "memory");
    } while (done == 0);
}

__device__ __forceinline__ uint32_t address_in_block(const void* shared, int rank) {
    uint32_t address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(shared)), "r"(rank));
    return address;
}
// 16 or 8 bytes to the same variable of another block, or of this one.
__device__ __forceinline__ void send(uint4* to, const uint4& value, int rank, uint64_t* arrival) {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
            address_in_block(to, rank)),
        "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(address_in_block(arrival, rank))
        : "memory");
}
__device__ __forceinline__ void send(uint64_t* to, uint64_t value, int rank, uint64_t* arrival) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(
                     address_in_block(to, rank)),
                 "l"(value), "r"(address_in_block(arrival, rank))
                 : "memory");
}
// 8 or 4 bytes to an address_in_block, counted by an arrival that is given so too.
__device__ __forceinline__ void send_to(uint32_t address, const float2& value, uint32_t arrival) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(address),
                 "f"(value.x), "f"(value.y), "r"(arrival)
                 : "memory");
}
__device__ __forceinline__ void send_to(uint32_t address, float value, uint32_t arrival) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(address),
                 "f"(value), "r"(arrival)
                 : "memory");
}

#else

__device__ __forceinline__ int cluster_block() { return 0; }
__device__ __forceinline__ int cluster_index() { return static_cast<int>(blockIdx.x); }
__device__ __forceinline__ int cluster_count() { return static_cast<int>(gridDim.x); }
__device__ __forceinline__ void publish_arrivals() {}
__device__ __forceinline__ void appear_without_arrivals() {}
__device__ __forceinline__ void appear_in_cluster() {}
__device__ __forceinline__ void arrive_at_cluster() {}
__device__ __forceinline__ void wait_for_cluster() {}
template <typename T> __device__ __forceinline__ T* in_block(T* shared, int) { return shared; }
__device__ __forceinline__ void make_arrival(uint64_t*) {}
__device__ __forceinline__ void expect_arrival(uint64_t*, uint32_t) {}
__device__ __forceinline__ void await_arrival(uint64_t*) {}
__device__ __forceinline__ void await_arrival(uint64_t*, uint32_t) {}
__device__ __forceinline__ void send(uint4*, const uint4&, int, uint64_t*) {}
__device__ __forceinline__ void send(uint64_t*, uint64_t, int, uint64_t*) {}

#endif

}  // namespace dijiang
