// Sizes and shared memory of the kernel that walks a sequence in spans of four chunks.
#pragma once

#include "attention/prefill/hopper/features.cuh"

namespace dijiang::prefill::hopper::spans {

constexpr int kGroups = 4;  // of four warps: one per chunk of a span
constexpr int kThreads = kGroups * kGroup;

template <int D> struct Span {
    using Tile = typename Shape<D>::Tile;
    static constexpr int kTiles = D / 8;
    static constexpr int kColumns = D / kGroups;  // of values: a group's part of the state
    static constexpr int kPieces = kColumns / 8;
    static constexpr int kTile = Shape<D>::kTile, kMatrix = Shape<D>::kMatrix;

    // Bytes of shared memory. Tiles: one per chunk of a span.
    static constexpr int kProj = 0;
    static constexpr int kQueries = kProj + kMatrix;  // rows of q
    static constexpr int kKeys = kQueries + kGroups * kTile;  // rows of k, then their features
    static constexpr int kWeighted = kKeys + kGroups * kTile;
    static constexpr int kValues = kWeighted + kGroups * kTile;  // of two spans
    static constexpr int kGates = kValues + 2 * kGroups * kTile;  // then outputs
    static constexpr int kState = kGates + kGroups * kTile;
    static constexpr int kShown = kState + kMatrix;  // barriers: what a span needs is there
    static constexpr int kFinished = kShown + 8;     // a span has been read
    static constexpr int kScales = kShown + 16;  // what each group's part of the state's copy is multiplied by
    static constexpr int kPlace = kScales + 16;
    static constexpr int kTurns = kPlace + 96;
    static constexpr int kLanes = kTurns + 16 * (D / 2);  // each lane's part of rotations
    static constexpr int kShared = kLanes + 4 * 32;
    static_assert(sizeof(Place) <= kTurns - kPlace && kShared <= 227 << 10);
};

// Named barriers: one per group.
__device__ __forceinline__ int meeting_of(int group) { return 1 + group; }

// A group's part of the state: [feature, its value columns], in accumulators.
template <int D> using Part = float[Span<D>::kPieces][4];

}  // namespace dijiang::prefill::hopper::spans
