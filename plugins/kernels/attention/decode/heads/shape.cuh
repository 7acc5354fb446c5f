// How a block of the kernel of heads is made, and its shared memory.
#pragma once

#include "device/copies.cuh"

namespace dijiang {
namespace decode {

// Of a head, or of its part of W columns.
template <int D_, int W_, int Threads, int MostHeads, int Blocks, int Held = 0> struct HeadShape {
    static constexpr int D = D_, W = W_, kThreads = Threads, kWarps = Threads / 32;
    static constexpr int kSplits = D / W;                                  // blocks of a head, a cluster
    static constexpr int kQuads = W / 4, kSubs = Threads / kQuads;         // a thread has 4 columns of every kSubs-th row,
    static constexpr int kRows = D / kSubs;                                // so many
    static constexpr int kHeld = Held;                                     // the last of them, held in registers
    static constexpr int kLanes = 32 % kQuads == 0 ? 32 / kQuads : 1;      // lanes of a warp with the same columns
    static constexpr int kParts = kSubs / kLanes;                          // sums of a column that meet in shared memory
    static constexpr int kProjAhead = kRows % 8 == 0 ? 8 : kRows / 2;      // rows of P that a thread asks for at once
    static constexpr int kElements = (D + Threads - 1) / Threads;          // of q, of k, of the logits, of a thread
    static constexpr int kLogits = (D + 31) / 32;                          // of q, and of k, of a lane
    static constexpr int kGroups = kRows % 4 == 0 ? 4 : 2;                 // in which a thread's rows arrive
    static constexpr int kMostHeads = MostHeads;                           // of a block
    static constexpr int kBlocks = Blocks;                                 // with as many heads, that registers let in
    // Bytes: the state; q and k, then their features; sums of columns, then outputs and norm; logits; an arrival.
    static constexpr int kTurnedAt = 16 * Threads * (kRows - Held), kSumsAt = kTurnedAt + 8 * D;
    static constexpr int kLogitsAt = kSumsAt + 8 * kParts * W, kArrivalAt = kLogitsAt + 8 * D;
    static constexpr int kMemory = kArrivalAt + (kSplits > 1 ? 16 : 0);
    static_assert(kQuads * kSubs == Threads && kRows * kSubs == D && kParts * kLanes == kSubs, "whole rows");
    static_assert(Threads % 32 == 0 && (kElements == 1 || D % Threads == 0), "whole warps");
    static_assert(W <= Threads, "a thread has a channel");
    static_assert(kRows % kProjAhead == 0 && kRows % kGroups == 0, "whole groups");
    static_assert(4 * kParts * W + 12 * W <= 8 * kParts * W, "room for outputs and norm");
    static_assert(MostHeads == 1 || W == D, "heads or parts");
};

// As measured best on an H100: many small blocks, whose steps mix. Heads of 80 come in twos and threes.
using HeadShape64 = HeadShape<64, 64, 128, 4, 2>;
using HeadShape80 = HeadShape<80, 80, 160, 3, 2>;
using HeadShape128 = HeadShape<128, 64, 128, 1, 6>;
using HeadShape256 = HeadShape<256, 32, 128, 1, 6, 1>;

// The shared memory of one head of a block.
template <typename S> struct HeadMemory {
    float4* state;     // [row of a thread][thread]
    float2* features;  // [D] of q and of k: first turned, then features that are still to be divided by their sums
    float2* sums;      // [part][W] of q and of k
    float* outputs;    // [part][W], where the sums were
    float* raw;        // [W]
    float2* affine;    // [W]: GroupNorm's weight and bias, times the gate
    float2* logits;    // [D] of q and of k
    uint64_t* arrival;

    explicit __device__ __forceinline__ HeadMemory(unsigned char* shared)
        : state(reinterpret_cast<float4*>(shared)), features(reinterpret_cast<float2*>(shared + S::kTurnedAt)),
          sums(reinterpret_cast<float2*>(shared + S::kSumsAt)), outputs(reinterpret_cast<float*>(sums)),
          raw(outputs + S::kParts * S::W), affine(reinterpret_cast<float2*>(raw + S::W)),
          logits(reinterpret_cast<float2*>(shared + S::kLogitsAt)),
          arrival(reinterpret_cast<uint64_t*>(shared + S::kArrivalAt)) {}
};

}  // namespace decode
}  // namespace dijiang
