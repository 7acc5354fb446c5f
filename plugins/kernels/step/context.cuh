// What all of a block's warps know during a step.
#pragma once

#include "device/activation.cuh"
#include "device/elements.cuh"
#include "step/product.cuh"

namespace dijiang {
namespace step {

// In shared memory behind the ring's barriers.
struct BlockFacts {
    Cut cut[kMatrices];  // this block's rows of each matrix, or the first kBatch groups of them
    int32_t first[kMatrices], groups[kMatrices], lanes_shift[kMatrices];
    int32_t id[DIJIANG_STEP_MAX_ROWS], position[DIJIANG_STEP_MAX_ROWS], valid[DIJIANG_STEP_MAX_ROWS];
    uint32_t epoch;
};

template <typename T, int R> struct Context {
    const Params& p;
    uint8_t* const shared;
    Cursor at;
    const uint8_t* constants;    // of this layer
    uint32_t tag = 0;            // of this layer's values but for the residual stream behind it, which has the next
    int turn = 0;                // which of the two buffers of partial sums

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
        return *reinterpret_cast<const BlockFacts*>(shared + 2 * kMostSlots * sizeof(uint64_t));
    }
    __device__ __forceinline__ int first_group(int matrix) const { return facts().first[matrix]; }
    __device__ __forceinline__ int groups(int matrix) const { return facts().groups[matrix]; }
    // Partial sums take turns, so that a product may begin while slower threads still add up the one before.
    __device__ __forceinline__ float* next_parts() {
        turn ^= 1;
        return in_shared<float>(p.memory.parts[turn]);
    }
};

// How many neighbouring threads add up the pieces of one output, log2: no more than there are pieces and threads.
template <int R> __device__ __forceinline__ int lanes_shift_of(const Cut& cut, int most) {
    const int pieces = cut.each ? (cut.chunks + cut.each - 1) / cut.each : 1;
    int shift = 0;
    while (shift < most && 1 << shift < pieces && (cut.groups * R * kGroup) << (shift + 1) <= kThreads) ++shift;
    return shift;
}
constexpr int kMostLanesShift = 2;  // outputs of one group then are in one warp: they may be exchanged

// This block's rows of a matrix times x, a batch after the other. finish(there, group, row, output, sum, shift) is called
// by whole warps: `there` says whether a thread has a value, which is 2^shift threads from the next output's; groups count
// from the block's first.
template <typename T, int R, typename Finish>
__device__ __forceinline__ void rows_of(Context<T, R>& c, int matrix, const T* x, Finish finish) {
    const int all = c.groups(matrix);
    for (int batch = 0; batch < all; batch += kBatch) {
        const bool whole = all - batch >= kBatch || batch == 0;
        const Cut cut = whole ? c.facts().cut[matrix] : Cut(all - batch, c.p.layout.chunks(matrix));
        const int shift = whole ? c.facts().lanes_shift[matrix] : 0, total = (cut.groups * R * kGroup) << shift;
        float* parts = c.next_parts();
        multiply<T, R>(c.at, cut, x, parts);
        meet();
        for (int v0 = threadIdx.x / 32 * 32; v0 < total; v0 += kThreads) {
            const int t = v0 + threadIdx.x % 32, v = t >> shift, part = t & ((1 << shift) - 1);
            const int output = v % kGroup, row = v / kGroup % R, group = v / (kGroup * R);
            float sum = t < total ? some_pieces<R>(cut, parts, group, row, output, part, 1 << shift) : 0.0f;
            sum = sum_of_lanes(sum, 1 << shift);
            finish(t < total && part == 0, batch + group, row, output, sum, shift);
        }
    }
}

}  // namespace step
}  // namespace dijiang
