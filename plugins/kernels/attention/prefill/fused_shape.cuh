// Sizes, shared memory and coordinates of the fused kernel.
#pragma once

#include "attention/prefill/launch.h"
#include "attention/prefill/schedule.h"
#include "device/barriers.cuh"
#include "device/copies.cuh"
#include "device/math.cuh"
#include "device/mma.cuh"
#include "device/registers.cuh"

namespace dijiang::prefill {

// Features are kept this much larger in float16, whose smallest normal number is 6e-5. A power of two.
template <typename T> constexpr float kFeatureUnit = 1.0f;
template <> inline constexpr float kFeatureUnit<__half> = 256.0f;

template <int D> struct Shape {
    // Heads of 256 are too large for one block: it owns 64 value columns, and finds the features in the workspace.
    static constexpr bool kWide = D == 256;
    static constexpr int kColumns = 16;  // value columns per consumer warp
    static constexpr int kConsumers = kWide ? 4 : D / kColumns;
    static constexpr int kProducers = 4;                    // or 8 with schedule.cpp's: q and k to warps of their own
    static constexpr int kWarps = kConsumers + kProducers;  // per head
    static constexpr int kMostHeads = D > 80 ? 1 : 2;       // per block
    static constexpr int kThreads = 32 * kWarps * kMostHeads;
    static constexpr int kBlocks = 1;
    static constexpr int kOwn = kColumns * kConsumers;  // value columns per block and head
    static constexpr int kPitch = D + 8;                // elements per row of a tile: ldmatrix without bank conflicts
    static constexpr int kValuePitch = kOwn + 8;
    static constexpr int kScorePitch = kChunk + 8;
    static constexpr int kReadTiles = D == 64 || D == 128 ? 4 : 2;  // of 16 tokens read out at once: what registers allow
    static constexpr int kNormRows = 4;  // normalised together, likewise
    static constexpr int kLoadUnroll = D == 80 ? 1 : 2;

    // Bytes of shared memory: P, then per head what follows, then GroupNorm's moments.
    static constexpr int kProj = kWide ? 0 : 2 * D * kPitch;
    static constexpr int kTile = 2 * kChunk * kPitch;
    static constexpr int kValueTile = 2 * kChunk * kValuePitch;
    static constexpr int kRaw = 0;  // k then q as loaded
    static constexpr int kValues = kWide ? 0 : 2 * kTile;
    static constexpr int kGate = kValues + kValueTile;
    static constexpr int kTerms = kGate + kValueTile;
    static constexpr int kTermSets = 4;  // more than chunks that anybody is ahead of somebody
    static constexpr int kFeatures = kTerms + kTermSets * 6 * kChunk * 4;  // one or two stages: phi(k), phi(q) and
    static constexpr int kScores = kFeatures + 2 * kTile;                  // scores
    static constexpr int kStage = 2 * kTile + 2 * kChunk * kScorePitch;
    static constexpr int kNarrowest = kWide ? 8 : 16;  // columns of one GroupNorm unit
    static constexpr int kStats = 2 * 2 * kChunk * (kOwn / kNarrowest) * 4;  // per head
};

// Per chunk, arrays of 64: cumulative log2 decay, gain, e^A, read scale, GroupNorm's epsilon in units of o without the
// read scale (whose sign it carries), and, as T, the weight in the state's update.
struct ChunkTerms {
    float *total, *gain, *fade, *read, *epsilon;
    void* weight;
    __device__ __forceinline__ ChunkTerms(char* head_memory, int offset, int step) {
        total = reinterpret_cast<float*>(head_memory + offset) + step % 4 * 6 * kChunk;
        gain = total + kChunk;
        fade = gain + kChunk;
        read = fade + kChunk;
        epsilon = read + kChunk;
        weight = epsilon + kChunk;
    }
};

// How the launch was cut.
struct Cut {
    int set, segments, segment_chunks;
    int stages;       // of features and scores; 2 only with one head per block
    int head_memory;  // bytes
    const void* features;  // wide: T [B, H + Hkv, chunks * 64, D], times kFeatureUnit
    float* raw;     // [B, L, H d], or null if the kernel normalises
    float* states;  // per job and segment, in the order of the consumers' registers; then the segments' log2 decay
};

// Where a block works.
struct Place {
    int job, row, set, first_head;
    int first_column;  // of a wide head
    int kv_head[2];    // of each head
    float4 turns[64];  // of a pair of dimensions: turns per token (hi, lo), then cos and sin of one step
    int segment, segments;  // of those that hold tokens of this row
    int length, position;
    int first_token, last_token, first_chunk, last_chunk;
    int steps;  // chunks of both walks
    // Chunks before this one.
    __device__ __forceinline__ int step(int chunk, bool last_walk) const {
        return last_walk ? steps - (last_chunk - chunk) : chunk - first_chunk;
    }
};

enum Barrier { kProduced = 1, kFull = 2, kEmpty = 3, kNormed = 7 };  // the first three plus 3 per head

}  // namespace dijiang::prefill
