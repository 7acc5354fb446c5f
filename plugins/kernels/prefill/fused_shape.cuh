// Sizes, shared memory and coordinates of the fused kernel.
#pragma once

#include "mma.cuh"
#include "prefill/launch.h"
#include "prefill/plan.h"

namespace dijiang::prefill {

template <int D> struct Shape {
    // Heads of 256 are too large for one block: it owns 64 value columns, and finds the features in the workspace.
    static constexpr bool kWide = D == 256;
    static constexpr int kColumns = D == 128 ? 32 : 16;  // value columns per consumer warp
    static constexpr int kConsumers = kWide ? 4 : D / kColumns;
    static constexpr int kProducers = 4;
    static constexpr int kWarps = kConsumers + kProducers;  // per head
    static constexpr int kMostHeads = D > 80 ? 1 : 2;       // per block
    static constexpr int kThreads = 32 * kWarps * kMostHeads;
    static constexpr int kBlocks = 1;
    static constexpr int kOwn = kColumns * kConsumers;  // value columns per block and head
    static constexpr int kPitch = D + 8;                // elements per row of a tile: ldmatrix without bank conflicts
    static constexpr int kValuePitch = kOwn + 8;
    static constexpr int kScorePitch = kChunk + 8;
    static constexpr int kUnroll = D > 80 ? 4 : 1;  // of the state's update: what registers allow
    static constexpr bool kTogether = D == 128;     // q and k in one pass over P, likewise
    static constexpr int kNormRows = D == 80 ? 2 : 8;
    static constexpr int kLoadUnroll = D > 80 ? 4 : 1;
    static constexpr int kStages = kWide ? 2 : 1;   // of features and scores

    // Bytes of shared memory, head by head after P.
    static constexpr int kProj = kWide ? 0 : 2 * D * kPitch;
    static constexpr int kTile = 2 * kChunk * kPitch;
    static constexpr int kValueTile = 2 * kChunk * kValuePitch;
    static constexpr int kScoreTile = 2 * kChunk * kScorePitch;
    static constexpr int kRaw = 0;  // k then q as loaded
    static constexpr int kFeatures = kWide ? 0 : 2 * kTile;  // phi(k) then phi(q)
    static constexpr int kValues = kFeatures + kStages * 2 * kTile;
    static constexpr int kGate = kValues + kValueTile;
    static constexpr int kScores = kGate + kValueTile;
    static constexpr int kTerms = kScores + kStages * kScoreTile;
    static constexpr int kHead = kTerms + 2 * 5 * kChunk * 4;
    static constexpr int kNarrowest = kWide ? 8 : 16;  // columns of one GroupNorm unit
    static constexpr int kStats = 2 * 3 * kChunk * (kOwn / kNarrowest) * 4 * kMostHeads;  // once per block
};

// Per chunk, five arrays of 64 floats: cumulative log2 decay, gain, e^A, weight in the state's update, read scale.
struct ChunkTerms {
    float *total, *gain, *fade, *weight, *read;
    __device__ __forceinline__ ChunkTerms(char* head_memory, int offset, int parity) {
        total = reinterpret_cast<float*>(head_memory + offset) + parity * 5 * kChunk;
        gain = total + kChunk;
        fade = gain + kChunk;
        weight = fade + kChunk;
        read = weight + kChunk;
    }
};

// How the launch was cut.
struct Cut {
    int set, segments, segment_chunks;
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
};

enum Barrier { kProduced = 1, kFull = 2, kEmpty = 3, kNormed = 7 };  // the first three plus 3 per head

}  // namespace dijiang::prefill
