// Sizes, shared memory and coordinates of the fused kernel.
#pragma once

#include "mma.cuh"
#include "prefill/launch.h"
#include "prefill/plan.h"

namespace dijiang::prefill {

template <int D> struct Shape {
    static constexpr int kColumns = D == 128 ? 32 : 16;  // value columns per consumer warp
    static constexpr int kConsumers = D / kColumns;
    static constexpr int kProducers = 4;
    static constexpr int kWarps = kConsumers + kProducers;  // per head
    static constexpr int kMostHeads = D == 128 ? 1 : 2;     // per block
    static constexpr int kThreads = 32 * kWarps * kMostHeads;
    static constexpr int kBlocks = 1;
    static constexpr int kPitch = D + 8;          // elements per row of a tile: ldmatrix without bank conflicts
    static constexpr int kScorePitch = kChunk + 8;
    static constexpr int kUnroll = D == 128 ? 4 : 1;  // of the state's update: what registers allow
    // Both q and k in one pass over P where registers allow.
    static constexpr bool kTogether = D == 128;

    // Bytes of shared memory, head by head after P.
    static constexpr int kProj = 2 * D * kPitch;
    static constexpr int kTile = 2 * kChunk * kPitch;
    static constexpr int kRaw = 0;                 // k then q as loaded
    static constexpr int kFeatures = 2 * kTile;    // phi(k) then phi(q)
    static constexpr int kValues = 4 * kTile;
    static constexpr int kGate = 5 * kTile;
    static constexpr int kScores = 6 * kTile;
    static constexpr int kTerms = kScores + 2 * kChunk * kScorePitch;
    static constexpr int kHead = kTerms + 2 * 5 * kChunk * 4;
    static constexpr int kStats = 2 * 3 * kChunk * (D / 16) * 4 * kMostHeads;  // GroupNorm's moments, once per block
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
    float* raw;     // [B, L, H d], or null if the kernel normalises
    float* states;  // per job and segment, in the order of the consumers' registers; then the segments' log2 decay
};

// Where a block works.
struct Place {
    int job, row, set, first_head;
    int segment, segments;  // of those that hold tokens of this row
    int length, position;
    int first_token, last_token, first_chunk, last_chunk;
};

enum Barrier { kProduced = 1, kFull = 2, kEmpty = 3, kNormed = 7 };  // the first three plus 3 per head

}  // namespace dijiang::prefill
