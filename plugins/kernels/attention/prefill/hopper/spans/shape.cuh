// Sizes and shared memory of the kernel that walks a sequence in spans of four chunks.
#pragma once

#include "attention/prefill/hopper/features.cuh"

namespace dijiang::prefill::hopper::spans {

constexpr int kGroups = 4;  // of four warps: one per chunk of a span
constexpr int kThreads = kGroups * kGroup;

template <int D> struct Sizes {
    using Tile = typename Shape<D>::Tile;
    static constexpr int kTiles = D / 8;
    static constexpr int kBlocks = D / 64;          // of 64 features
    static constexpr int kColumns = D / kGroups;  // of values: a group's part of the state
    static constexpr int kColumnTiles = kColumns / 8;
    static constexpr int kPieces = kBlocks * kColumnTiles;  // of a part, four registers each
    static constexpr int kTile = Shape<D>::kTile, kMatrix = Shape<D>::kMatrix;
};

// What follows the tiles in shared memory.
template <int D, int kBytes> struct Rest {
    static constexpr int kBarrier = kBytes;
    static constexpr int kScales = kBarrier + 16;  // what each group's part of the state's copy is multiplied by
    static constexpr int kPlace = kScales + 16;
    static constexpr int kTurns = kPlace + 96;
    static constexpr int kLanes = kTurns + 16 * (D / 2);  // each lane's part of rotations
    static constexpr int kShared = kLanes + 4 * 32;
    static_assert(sizeof(Place) <= kTurns - kPlace && kShared <= 227 << 10);
};

// Bytes of shared memory. Heads of 64: each group has a chunk of a span of four.
template <int D> struct Span : Sizes<D>, Rest<D, 2 * Sizes<D>::kMatrix + 24 * Sizes<D>::kTile> {
    using S = Sizes<D>;
    static constexpr int kProj = 0;
    static constexpr int kQueries = kProj + S::kMatrix;  // rows of q
    static constexpr int kKeys = kQueries + kGroups * S::kTile;  // rows of k, then their features
    static constexpr int kWeighted = kKeys + kGroups * S::kTile;
    static constexpr int kValues = kWeighted + kGroups * S::kTile;  // of two spans
    static constexpr int kGates = kValues + 2 * kGroups * S::kTile;  // then outputs
    static constexpr int kState = kGates + kGroups * S::kTile;
};

// Heads of 128: a span is two chunks of two groups each. In the first walk each group has a chunk: its weighted keys
// from kQueries on, values from kValues on, rows of k from kKeys on.
template <> struct Span<128> : Sizes<128>, Rest<128, 2 * Sizes<128>::kMatrix + 10 * Sizes<128>::kTile> {
    static constexpr int kProj = 0;
    static constexpr int kQueries = kProj + kMatrix;  // rows of q, then their features as they meet the state
    static constexpr int kWeighted = kQueries + 2 * kTile;
    static constexpr int kValues = kWeighted + 2 * kTile;
    static constexpr int kGates = kValues + 2 * kTile;  // then outputs
    static constexpr int kKeys = kGates + 2 * kTile;  // rows of k, then their features, then scores
    static constexpr int kState = kKeys + 2 * kTile;
    static_assert(kState + kMatrix == kBarrier);
};

// Named barriers: one per group, one of all, and one per pair of groups.
__device__ __forceinline__ int meeting_of(int group) { return 1 + group; }
constexpr int kAll = 1 + kGroups, kPairs = 2 + kGroups;

// A group's part of the state: [feature, its value columns], in accumulators.
template <int D> using Part = float[Span<D>::kPieces][4];

}  // namespace dijiang::prefill::hopper::spans
