// What all of a block's warps know during a step.
#pragma once

#include "device/activation.cuh"
#include "device/elements.cuh"
#include "step/product.cuh"

namespace dijiang {
namespace step {

// How many slots a thread waits for together where there are many: as its registers allow, of which the compiler needs
// more for other architectures than 9.0.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
constexpr int kManyLooks = 8;
#else
constexpr int kManyLooks = 16;
#endif

// Some slots that a thread waits for together: slot i is at(i) behind `from`, and nobody's unless there(i) (but the first can
// be looked at). Two neighbouring ones at once where a slot has 8 bytes.
template <int kCount, typename Slot> struct Looks {
    uint4 of[kCount];

    template <typename At, typename There>
    __device__ __forceinline__ Looks(const Slot* from, uint32_t tag, At at, There there) {
        await([&] {
            bool all = true;
#pragma unroll
            for (int i = 0; i < kCount; ++i) of[i] = look_at(from + (there(i) ? at(i) : 0));
#pragma unroll
            for (int i = 0; i < kCount; ++i)
                if (there(i)) all &= (sizeof(Slot) == 16 || of[i].y == tag) && of[i].w == tag;
            return all;
        });
    }

private:
    static __device__ __forceinline__ uint4 look_at(const uint2* slots) { return look_at_two(slots); }
    static __device__ __forceinline__ uint4 look_at(const uint4* slot) { return look(slot); }
};

// Quantised weights: how warps take the units of groups of one format.
struct Turns {
    uint16_t units;       // of a group
    uint16_t skip, rest;  // from one of a warp's units to its next: groups, and units of a group
    uint16_t nothing;
};

// In shared memory behind the ring's barriers.
struct BlockFacts {
    Part of[kMatrices];
    int32_t id[DIJIANG_STEP_MAX_ROWS], position[DIJIANG_STEP_MAX_ROWS], valid[DIJIANG_STEP_MAX_ROWS];
    // Of quantised weights alone.
    // Of attention's parts: how many groups other blocks before this one have, where this one's end among its groups, and what
    // is from a packed group's number to that of its rows.
    int32_t part_before[kParts], part_ends[kParts], part_shift[kParts];
    Turns turns[kMatrices][2];              // of a matrix in int4, and in int8
    uint16_t starts[kMatrices][2][kWarps];  // each warp's first unit: 256 times its group, and which of that
    uint32_t epoch;
    uint32_t waiting;  // 1: this block waits for others' values
};
static_assert(kBarriers + sizeof(BlockFacts) <= kHeader, "the beginning of shared memory");

template <typename T, int R> struct Context {
    const Params& p;
    uint8_t* const shared;
    Cursor at;
    const uint8_t* constants;    // of this layer
    uint32_t tag = 0;            // of this layer's values but for the residual stream behind it, which has the next

    template <typename Cut>
    __device__ __forceinline__ Context(const Params& params, uint8_t* memory, const Ring<Cut>& ring)
        : p(params), shared(memory), at(ring), constants(nullptr) {}

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
        return *reinterpret_cast<const BlockFacts*>(shared + kBarriers);
    }
    // Says whether this block waits for others' values: then its weights come more slowly.
    __device__ __forceinline__ void set_waiting(bool waiting) const {
        if (threadIdx.x == 0) set_flag(&const_cast<BlockFacts&>(facts()).waiting, waiting);
    }
    __device__ __forceinline__ int first_group(int matrix) const { return facts().of[matrix].first; }
    __device__ __forceinline__ int groups(int matrix) const { return facts().of[matrix].groups; }
};



}  // namespace step
}  // namespace dijiang
