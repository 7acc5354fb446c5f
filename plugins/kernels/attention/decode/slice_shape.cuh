// How the slice kernel lays a slice over a block's warps and lanes, and sums over lanes.
#pragma once

#include "device/elements.cuh"

namespace dijiang {
namespace decode {

template <int D_, int W_, int Warps> struct Slice {
    static constexpr int D = D_, W = W_, kWarps = Warps, kThreads = 32 * Warps;
    static constexpr int kSplits = D / W;
    static constexpr int kQuads = W / 4;                           // float4 in a row of the slice
    static constexpr int kSubs = 32 / kQuads;                      // rows that a warp touches at once
    static constexpr int kRows = D / kWarps;                       // rows of a warp
    static constexpr int kSteps = (kRows + kSubs - 1) / kSubs;     // rows of a lane
    static constexpr int kTurned = kRows <= 16 ? 1 : 2;            // elements of q and k that a lane turns
    static constexpr int kKeyLane = kRows <= 16 ? kRows : 0;       // where k's begin, in the last of them
    static constexpr bool kExchange = kSplits > 1;                 // blocks share a head
    static constexpr int kMostClusterChannels = 8 * W;
    static constexpr int kLogits = D / 16;                         // logits of q or of k of a lane
    // Of shared memory, beside the states; rounded up.
    static constexpr int kStaticBytes = 24 * D + 12 * kWarps * W + 88 * W + 128;
    static constexpr bool kFull = kQuads * kSubs == 32 && kRows % kSubs == 0;  // no lane or step is idle
    static_assert(D % kWarps == 0 && W % 4 == 0 && kRows <= 32, "untried shape");
};

// Sums N values over the lanes that share a column quad. Afterwards lane 0 of them, or with a power of two of
// them each lane, holds a part: `count` values starting at `start`.
template <int Quads, int Subs, int N> struct SubSum {
    static constexpr bool kPowerOfTwo = Quads * Subs == 32;
    static constexpr int kKept = kPowerOfTwo ? (N / Subs > 0 ? N / Subs : 1) : N;

    // Returns where the kept values start; negative if this lane keeps none.
    static __device__ __forceinline__ int run(float (&v)[N], int lane) {
        int start = 0;
        if constexpr (kPowerOfTwo) {
            int left = N;
#pragma unroll
            for (int offset = 16; offset >= Quads; offset /= 2) {
                const bool upper = (lane & offset) != 0;
                if (left > 1) {
                    left /= 2;
#pragma unroll
                    for (int i = 0; i < N / 2; ++i) {
                        if (i < left) {
                            const float given = upper ? v[i] : v[i + left];
                            const float kept = upper ? v[i + left] : v[i];
                            v[i] = kept + __shfl_xor_sync(~0u, given, offset);
                        }
                    }
                    start += upper ? left : 0;
                } else {
                    v[0] += __shfl_xor_sync(~0u, v[0], offset);
                    if (upper) start = -N;
                }
            }
        } else {
#pragma unroll
            for (int i = 0; i < N; ++i) {
                float sum = v[i];
#pragma unroll
                for (int sub = 1; sub < Subs; ++sub) sum += __shfl_down_sync(~0u, v[i], sub * Quads);
                v[i] = sum;
            }
            if (lane >= Quads) start = -N;
        }
        return start;
    }
};

}  // namespace decode
}  // namespace dijiang
