// What all of a block's warps know during a step.
#pragma once

#include "device/activation.cuh"
#include "device/elements.cuh"
#include "step/product.cuh"

namespace dijiang {
namespace step {

// In shared memory behind the ring's barriers.
struct BlockFacts {
    Part of[kMatrices];
    int32_t id[DIJIANG_STEP_MAX_ROWS], position[DIJIANG_STEP_MAX_ROWS], valid[DIJIANG_STEP_MAX_ROWS];
    uint32_t epoch;
    volatile uint32_t waiting;  // 1: this block waits for others' values
};

template <typename T, int R> struct Context {
    const Params& p;
    uint8_t* const shared;
    Cursor at;
    const uint8_t* constants;    // of this layer
    uint32_t tag = 0;            // of this layer's values but for the residual stream behind it, which has the next
    float pivot = 0.0f;          // near the mean of this thread's row of the residual stream

    __device__ __forceinline__ Context(const Params& params, uint8_t* memory)
        : p(params), shared(memory), at(Ring(params, memory)), constants(nullptr) {}

    template <typename U> __device__ __forceinline__ U* in_shared(int offset) const {
        return reinterpret_cast<U*>(shared + offset);
    }
    template <typename U> __device__ __forceinline__ U* in_sync(int64_t offset) const {
        return reinterpret_cast<U*>(p.sync + offset);
    }
    template <typename U = float> __device__ __forceinline__ const U* constant(int64_t offset) const {
        return reinterpret_cast<const U*>(constants + offset);
    }
    __device__ __forceinline__ const BlockFacts& facts() const {
        return *reinterpret_cast<const BlockFacts*>(shared + (kPieces + 1) * kMostSlots * sizeof(uint64_t));
    }
    // Says whether this block waits for others' values: then its weights come more slowly.
    __device__ __forceinline__ void set_waiting(bool waiting) const {
        if (threadIdx.x == 0) const_cast<BlockFacts&>(facts()).waiting = waiting;
    }
    __device__ __forceinline__ int first_group(int matrix) const { return facts().of[matrix].first; }
    __device__ __forceinline__ int groups(int matrix) const { return facts().of[matrix].groups; }
};


}  // namespace step
}  // namespace dijiang
