// Sizes, shared memory and coordinates of the kernel for compute capability 9.0.
#pragma once

#include "attention/prefill/launch.h"
#include "attention/prefill/schedule.h"
#include "attention/terms.cuh"
#include "device/barriers.cuh"
#include "device/math.cuh"
#include "device/registers.cuh"
#include "device/warpgroup.cuh"

namespace dijiang::prefill::hopper {

// Scores' features, scores and outputs are kept this much larger in float16, whose smallest normal number is 6e-5;
// features that meet the state, and the state, by the square root. Powers of two.
template <typename T> constexpr float kUnit = 1.0f;
template <> inline constexpr float kUnit<__half> = 256.0f;
template <typename T> constexpr float kStateUnit = 1.0f;
template <> inline constexpr float kStateUnit<__half> = 16.0f;

constexpr int kGroup = 128;  // threads of a group of four warps

// A block's items are the chunks of its heads, heads within chunks.
template <int D> struct Shape {
    // Per block: 32 heads of 80 have groups of channels in two heads.
    static constexpr int kHeads = D == 80 ? 2 : 1;
    static constexpr int kWidth = D % 64 == 0 ? 64 : 16;  // columns of a tile's block
    using Tile = Tiles<kWidth>;
    using ScoreTile = Tile;
    static constexpr int kOutputGroups = 1;  // more would take chunks in turn
    static constexpr int kThreads = (3 + kOutputGroups) * kGroup;
    static constexpr int kStateTiles = (D + 63) / 64;  // of 64 features, the last perhaps in part
    static constexpr int kTiles = D / 8;               // of 8 columns
    // Registers a thread: features of keys, of queries, states, outputs. 128 on average.
    static constexpr bool kTrade = D > 64;
    static constexpr int kFeatureRegisters = D == 128 ? 112 : 104, kStateRegisters = D == 128 ? 176 : 192;
    static constexpr int kOutputRegisters = 112;

    // Bytes of shared memory.
    static constexpr int kTile = 2 * kChunk * D;  // of tokens
    static constexpr int kMatrix = 2 * D * D;     // P or a state
    static constexpr int kScoreTile = 2 * kChunk * kChunk;
    static constexpr int kStages = 2;                // of keys
    static constexpr int kQueryStages = D == 128 ? 1 : 2;  // of scores and queries
    static constexpr int kStateStages = D == 128 ? 1 : 2;
    static constexpr int kValueStages = kStateStages + 1;
    static constexpr int kProj = 0;
    static constexpr int kRaw = kProj + kMatrix;  // one per group
    static constexpr int kWeighted = kRaw + 2 * kTile;  // what is read past its end makes rows that nobody uses
    static constexpr int kKeys = kWeighted + kTile;  // the first walk's second weighted tile
    static constexpr int kFaded = kKeys + kStages * kTile;  // queries as they meet the state
    static constexpr int kScores = kFaded + kQueryStages * kTile;
    static constexpr int kValues = kScores + kQueryStages * kScoreTile;
    static constexpr int kGates = kValues + kValueStages * kTile;  // then outputs; one per head and group
    static constexpr int kStates = kGates + kOutputGroups * kHeads * kTile;
    static constexpr int kBarriers = kStates + kStateStages * kMatrix;
    static constexpr int kScales = kBarriers + 128;  // what a copy of a state is multiplied by
    static constexpr int kPlace = kScales + 16;
    // Of a pair of dimensions: turns per token (hi, lo), cos, sin of a step.
    static constexpr int kTurns = kPlace + 96;
    static constexpr int kLanes = kTurns + 16 * (D / 2);  // each lane's part of rotations
    static constexpr int kShared = kLanes + 4 * 32;
};

// Barriers in shared memory, and those of the groups.
template <int D> struct Barriers {
    using S = Shape<D>;
    uint32_t first;
    __device__ __forceinline__ uint32_t features_full(bool keys, int stage) const {
        return first + 8 * (2 * keys + stage);
    }
    __device__ __forceinline__ uint32_t features_empty(bool keys, int stage) const {
        return first + 32 + 8 * (2 * keys + stage);
    }
    __device__ __forceinline__ uint32_t state_full(int stage) const { return first + 64 + 8 * stage; }
    __device__ __forceinline__ uint32_t state_empty(int stage) const { return first + 80 + 8 * stage; }
    __device__ __forceinline__ uint32_t weighted_full(int group) const { return first + 96 + 8 * group; }
    __device__ __forceinline__ uint32_t weighted_empty(int group) const { return first + 112 + 8 * group; }
    static constexpr int kCount = 16;
};
enum Meeting { kKeyGroup = 1, kQueryGroup = 2, kStateGroup = 3, kFeatureGroups = 4 };

// How the launch was cut.
struct Cut {
    int segments, segment_chunks;
    float* states;  // per job: the past, then what each segment adds, in the order of the registers that hold it
};

// Where a block works.
struct Place {
    int job, row, first_head;
    int kv_head[2];   // of each head
    float decay[2];   // log2 of a token's
    int segment, segments;  // of those that hold tokens of this row
    int length, position;
    int first_token, last_token, first_chunk, last_chunk;
    const uint16_t* qkv;  // of the row
    const uint16_t* gate;
    uint16_t* output;
};

// Token of a chunk and channels of a fragment's register: row(0), row(1) = row(0) + 8; column 8 n + column().
__device__ __forceinline__ int lane_of() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp_of() { return threadIdx.x / 32 % 4; }
__device__ __forceinline__ int fragment_row() { return 16 * warp_of() + lane_of() / 4; }
__device__ __forceinline__ int fragment_column() { return 2 * (lane_of() % 4); }

// One lane of each warp says so for its warp, after everything that the warp did.
__device__ __forceinline__ void warp_arrives(uint32_t barrier) {
    __syncwarp();
    if (lane_of() == 0) arrive_at(barrier);
}

// Calls f(offset in a chunk's tile, row, piece of 8 columns) for this lane's share of its warp's 16 rows.
template <int D, typename F> __device__ __forceinline__ void each_piece(F&& f) {
    using Tile = typename Shape<D>::Tile;
    constexpr int kPieces = D / 8, kTurns = kPieces / 2, kRows = 32 / kPieces;
    const int lane = opaque(lane_of()), first = 16 * warp_of();
    if constexpr (32 % kPieces == 0) {
        const int row = first + lane / kPieces, piece = lane % kPieces;
        const uint32_t start = Tile::offset(kChunk, row, 8 * piece);
#pragma unroll
        for (int j = 0; j < kTurns; ++j)  // the rows of a turn differ in bits that no earlier one has
            f((start ^ (kRows * j & 7) * 16) + kRows * j * Tile::kRow, row + kRows * j, piece);
    } else {
#pragma unroll
        for (int j = 0; j < kTurns; ++j) {
            const int i = lane + 32 * j, row = first + i / kPieces, piece = i % kPieces;
            f(Tile::offset(kChunk, row, 8 * piece), row, piece);
        }
    }
}

// A warp's 16 rows of a chunk's tile; zeros from row `count` of the chunk on. `from`: its first row, whose next ones
// are `stride` elements further on.
template <int D>
__device__ __forceinline__ void load_rows(uint32_t tile, const void* from, int64_t stride, int count) {
    using Tile = typename Shape<D>::Tile;
    constexpr int kPieces = D / 8, kRows = 32 / kPieces;
    if (count >= kChunk) {
        if constexpr (32 % kPieces == 0) {  // each next row of a lane is as far on
            const int lane = opaque(lane_of());
            const char* at = static_cast<const char*>(from) + 2 * ((16 * warp_of() + lane / kPieces) * stride)
                             + lane % kPieces * 16;
            each_piece<D>([&](uint32_t to, int, int) {
                copy_async(tile + to, at);
                at += 2 * kRows * stride;
            });
        } else {
            each_piece<D>([&](uint32_t to, int row, int piece) {
                copy_async(tile + to, static_cast<const uint16_t*>(from) + row * stride + 8 * piece);
            });
        }
    } else {
#pragma unroll 1
        for (int i = lane_of(); i < 2 * D; i += 32) {  // the last chunk: little code is better than few instructions
            const int row = 16 * warp_of() + i / (D / 8), piece = i % (D / 8);
            const bool there = row < count;
            copy_async(tile + Tile::offset(kChunk, row, 8 * piece),
                       static_cast<const uint16_t*>(from) + (there ? row * stride + 8 * piece : 0), there);
        }
    }
    commit_copies();
}

// A warp of each block that has read what it waited for. Each flag has been read by a block that has left, so the last
// one to leave, `before` whom all others did, leaves the sync memory as it was found: `flags` words a block, and two.
__device__ __forceinline__ void clear_if_last(const AttentionParams& p, uint32_t before, int flags) {
    if (__shfl_sync(~0u, before, 0) != gridDim.x - 1) return;
    __threadfence();
    for (int i = lane_of(); i < 2 + flags * static_cast<int>(gridDim.x); i += 32) p.sync[i] = 0;
}
__device__ __forceinline__ void leave(const AttentionParams& p, int flags) {
    uint32_t before = 0;
    __syncwarp();
    if (lane_of() == 0) before = atomicAdd(p.sync + 1, 1u);
    clear_if_last(p, before, flags);
}

}  // namespace dijiang::prefill::hopper
