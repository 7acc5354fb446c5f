// Products of the rows in shared memory with the weights that stream by, on tensor cores.
#pragma once

#include "step/ring.cuh"

namespace dijiang {
namespace step {

// Element (row, k) of rows that will be multiplied: [chunk][row][32].
template <int R> __device__ __forceinline__ int x_index(int row, int k) {
    return (k / kChunk * R + row) * kChunk + k % kChunk;
}

// This warp's part of x times the groups of rows of a matrix. The rows of x are those of A; with fewer than eight the first
// is there again, and its results are left. A warp's sum for one group is a piece; group + warp numbers pieces without a
// gap or a clash, since the warps' shares follow each other.
template <typename T, int R> struct Multiplier {
    Cursor& at;
    const Cut& cut;
    const uint4* x;  // this lane's part of its row
    float* parts;
    int warp, group, chunk;
    float c[4] = {}, d[4] = {};

    __device__ __forceinline__ Multiplier(Cursor& cursor, const Cut& how, const T* rows, float* to)
        : at(cursor), cut(how), parts(to), warp(threadIdx.x / 32) {
        const int lane = threadIdx.x % 32, row = lane / 4;
        x = reinterpret_cast<const uint4*>(rows + (row < R ? row : 0) * kChunk) + lane % 4;
        group = cut.first_group(warp);
        chunk = warp * cut.each - group * cut.chunks;
    }
    __device__ __forceinline__ uint32_t unit(int round) const { return at.base + cut.place(round, warp); }

    // So many rounds if they are of one group and of one chunk of the stream: then all reads are under way at once.
    template <int kRounds> __device__ __forceinline__ bool together(int round, int count) {
        if (round + kRounds > count || chunk + kRounds > cut.chunks) return false;
        if (kRounds > 1 && !at.same_chunk(unit(round), unit(round + kRounds - 1))) return false;
        at.reach(unit(round));
        uint4 w[kRounds], v[kRounds];
#pragma unroll
        for (int i = 0; i < kRounds; ++i) {
            w[i] = at.read(unit(round + i));
            v[i] = x[(chunk + i) * (R * kChunk / 8)];
        }
#pragma unroll
        for (int i = 0; i < kRounds; ++i) {
            mma<T>(c, {v[i].x, 0u, v[i].y, 0u}, w[i].x, w[i].y);
            mma<T>(d, {v[i].z, 0u, v[i].w, 0u}, w[i].z, w[i].w);
        }
        chunk += kRounds;
        return true;
    }
    __device__ __forceinline__ void leave_piece() {
        const int lane = threadIdx.x % 32;
        if (lane / 4 < R)
            *reinterpret_cast<float2*>(parts + ((group + warp) * R + lane / 4) * kGroup + lane % 4 * 2) =
                make_float2(c[0] + d[0], c[1] + d[1]);
        c[0] = c[1] = c[2] = c[3] = d[0] = d[1] = d[2] = d[3] = 0.0f;
        chunk = 0;
        ++group;
    }
};

template <typename T, int R>
__device__ __forceinline__ void multiply(Cursor& at, const Cut& cut, const T* x, float* parts) {
    constexpr int kMost = R < 8 ? 4 : 2;  // reads under way
    Multiplier<T, R> it(at, cut, x, parts);
    const int count = cut.count(it.warp);
#pragma unroll 1
    for (int round = 0; round < count;) {
        round += it.template together<kMost>(round, count) ? kMost : it.template together<1>(round, count) ? 1 : 0;
        if (it.chunk == cut.chunks || round == count) it.leave_piece();
    }
    at.finish(cut.units);
}

// Of the pieces of an output, this thread's: every `lanes`-th from `first` on.
template <int R>
__device__ __forceinline__ float some_pieces(const Cut& cut, const float* parts, int group, int row, int output, int first,
                                             int lanes) {
    const int last = cut.last_warp(group);
    float sum = 0.0f;
    for (int w = cut.first_warp(group) + first; w <= last; w += lanes)
        sum += parts[((group + w) * R + row) * kGroup + output];
    return sum;
}
__device__ __forceinline__ float sum_of_lanes(float v, int lanes) {
    for (int offset = 1; offset < lanes; offset *= 2) v += __shfl_xor_sync(~0u, v, offset);
    return v;
}

}  // namespace step
}  // namespace dijiang
