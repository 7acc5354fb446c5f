// Sizes, shared memory and barriers of the two kernels for heads of 256, whose states are cut in slices.
#pragma once

#include "attention/prefill/hopper/features.cuh"
#include "device/bulk.cuh"
#include "device/cluster.cuh"

namespace dijiang::prefill::hopper::slices {

// What the first kernel leaves of a head's chunk in device memory, as tiles (tiles.cuh) that are copied as they are:
// features of keys, weighted for the state; of queries, likewise; decayed scores.
template <int D> struct Item {
    using Tile = Tiles<64>;
    static constexpr int kTile = 2 * kChunk * D;
    static constexpr int kScoreTile = 2 * kChunk * kChunk;
    static constexpr int kKeys = 0, kQueries = kTile, kScores = 2 * kTile;
    static constexpr int kBytes = 2 * kTile + kScoreTile;

    static __device__ __forceinline__ int64_t offset(const AttentionParams& p, int row, int head, int chunk) {
        const int chunks = (p.length + kChunk - 1) / kChunk;
        return (static_cast<int64_t>(row * p.num_heads + head) * chunks + chunk) * kBytes;
    }
};

// Features in tiles and states have an order of their own, in which the eight that a lane holds of 32, as pairs in four
// tiles of 8 columns, are neighbours: the feature of column 8 n + 2 c + i, i < 2, where lanes have c = lane % 4.
__device__ __forceinline__ int feature_of(int n, int c, int i) { return n / 4 * 32 + 8 * c + n % 4 * 2 + i; }

// The first kernel: blocks of two groups, keys and queries. Two blocks share what they read of P.
template <int D> struct FeatureShape {
    static constexpr int kGroups = 2, kThreads = kGroups * kGroup;
    static constexpr int kBlocks = 2;  // of a cluster
    static constexpr int kTile = Item<D>::kTile;
    static constexpr int kProj = 0, kProjBytes = 2 * D * D;
    static constexpr int kRows = kProj + kProjBytes;  // of keys, of queries
    static constexpr int kKeys = kRows + kGroups * kTile;  // features for the scores
    static constexpr int kTurns = kKeys + kTile;
    static constexpr int kBarriers = kTurns + 16 * (D / 2);
    static constexpr int kShared = kBarriers + 8 * 5;
    static_assert(kShared <= 227 << 10);
};
struct FeatureBarriers {
    uint32_t first;
    __device__ __forceinline__ uint32_t projecting(int group) const { return first + 8 * group; }  // has been asked for
    __device__ __forceinline__ uint32_t keys_full() const { return first + 16; }
    __device__ __forceinline__ uint32_t keys_empty() const { return first + 24; }
    __device__ __forceinline__ uint32_t proj_full() const { return first + 32; }  // the other block's half
    __device__ __forceinline__ void make(uint32_t half_of_proj) const {
        for (int i = 0; i < 4; ++i) make_barrier(first + 8 * i, kGroup / 32);
        make_barrier(proj_full(), 1);
        expect_bytes(proj_full(), half_of_proj);
    }
};

// The second kernel: a block has a slice of a head's state, 64 value columns, a cluster some slices of the same head.
template <int D> struct Slice {
    using Tile = Tiles<64>;
    static constexpr int kColumns = 64, kSlices = D / kColumns;
    static constexpr int kBlocks = kSliceCluster;  // of a cluster
    static constexpr int kGroups = 3, kThreads = kGroups * kGroup;  // state, outputs, copies
    static constexpr int kTiles = D / 8;
    // Registers a thread; 168 on average.
    static constexpr int kStateRegisters = 240, kOutputRegisters = 152, kCopyRegisters = 112;

    static constexpr int kTile = Item<D>::kTile, kScoreTile = Item<D>::kScoreTile;
    static constexpr int kColumnTile = 2 * kChunk * kColumns;
    static constexpr int kKeyStages = 3, kQueryStages = 2, kValueStages = 3;
    static constexpr int kQueryStage = kTile + kScoreTile;
    static constexpr int kQueries = 0;  // and scores; before that, parts of states that other segments left
    static constexpr int kKeys = kQueries + kQueryStages * kQueryStage;
    static constexpr int kValues = kKeys + kKeyStages * kTile;
    // Outputs in float32, [token, value]: rows of so many that neither who writes nor who reads meets in a bank.
    static constexpr int kOutPitch = kColumns + 4;
    static constexpr int kOuts = kValues + kValueStages * kColumnTile;
    static constexpr int kBarriers = kOuts + 4 * kChunk * kOutPitch;
    static constexpr int kTicket = kBarriers + 8 * 18;
    static constexpr int kPlace = kTicket + 16;
    static constexpr int kShared = kPlace + 96;
    static_assert(sizeof(Place) <= kShared - kPlace && kShared <= 227 << 10);

    // What segments leave each other, in the order of the group's registers: a slot, and half of it.
    static constexpr int kSlotFloats = kTiles * 4 * kGroup, kPart = kSlotFloats * 2;
    static_assert(kPart <= kQueryStage);
};
template <int D> struct SliceBarriers {
    using S = Slice<D>;
    uint32_t first;
    __device__ __forceinline__ uint32_t keys_full(int stage) const { return first + 8 * stage; }
    __device__ __forceinline__ uint32_t keys_empty(int stage) const { return first + 24 + 8 * stage; }
    __device__ __forceinline__ uint32_t values_full(int stage) const { return first + 48 + 8 * stage; }
    __device__ __forceinline__ uint32_t values_empty(int stage) const { return first + 72 + 8 * stage; }
    __device__ __forceinline__ uint32_t queries_full(int stage) const { return first + 96 + 8 * stage; }
    __device__ __forceinline__ uint32_t queries_empty(int stage) const { return first + 112 + 8 * stage; }
    __device__ __forceinline__ uint32_t outputs_full() const { return first + 128; }
    __device__ __forceinline__ uint32_t outputs_empty() const { return first + 136; }
    __device__ __forceinline__ void make() const {
        constexpr int kWarps = kGroup / 32;
        for (int i = 0; i < S::kKeyStages; ++i) {
            make_barrier(keys_full(i), 1);  // and bytes
            make_barrier(keys_empty(i), S::kBlocks * kWarps);  // in all blocks: tiles are copied to all
        }
        for (int i = 0; i < S::kQueryStages; ++i) {
            make_barrier(queries_full(i), 1);
            make_barrier(queries_empty(i), S::kBlocks * kWarps);
        }
        for (int i = 0; i < S::kValueStages; ++i) {
            make_barrier(values_full(i), kWarps / 2);
            make_barrier(values_empty(i), kWarps);
        }
        make_barrier(outputs_full(), kWarps);
        make_barrier(outputs_empty(), kWarps);
    }
};

// Each warp of a group says so to all blocks of the cluster, after everything that it did.
template <int kBlocks> __device__ __forceinline__ void warp_arrives_everywhere(uint32_t barrier) {
    __syncwarp();
    if (lane_of() < kBlocks) arrive_in_block(barrier, lane_of());
}

// How the launch was cut, and what the first kernel left.
struct SliceCut {
    Cut cut;
    char* items;
};

// What a group of the second kernel works with.
template <int D> struct Walk {
    const AttentionParams& p;
    const Cut& cut;
    const Place& at;
    char* memory;
    uint32_t memory_at;
    int rank, slice;    // in the cluster, of the head
    int chunks;         // of the segment
    bool followed;      // so the segment is walked twice
    float decay;        // log2 of a token's
    SliceBarriers<D> barriers;

    __device__ __forceinline__ uint32_t operands() const { return operand_address(memory_at); }
    // Halves of slots that go through the queries' stages before queries do.
    __device__ __forceinline__ int parts() const { return cut.segments > 1 ? 2 * at.segment : 0; }
    __device__ __forceinline__ int chunks_before() const { return followed ? chunks : 0; }  // of the second walk
    __device__ __forceinline__ int left(int chunk) const {  // tokens from this chunk on
        return at.length - (at.first_chunk + chunk) * kChunk;
    }
    __device__ __forceinline__ float* slot(int i) const {
        return cut.states + (static_cast<int64_t>(at.job * Slice<D>::kSlices + slice) * cut.segments + i)
                                * Slice<D>::kSlotFloats;
    }
    __device__ __forceinline__ unsigned* flag(int segment) const {
        return p.sync + 2 + (at.job * Slice<D>::kSlices + slice) * cut.segments + segment;
    }
};

}  // namespace dijiang::prefill::hopper::slices
