// The state, cut by value columns among the groups: what segments tell each other of it, its copy as T, its update.
#pragma once

#include "attention/prefill/hopper/spans/shape.cuh"

namespace dijiang::prefill::hopper::spans {

// Calls f(index of [feature, value], two registers) for what this lane holds.
template <int D, typename F> __device__ __forceinline__ void each_pair(Part<D>& part, int group, F&& f) {
    using S = Span<D>;
    const int first = opaque(fragment_row()) * D + group * S::kColumns + fragment_column();
#pragma unroll
    for (int i = 0; i < S::kPieces; ++i) {
        f(first + 8 * i, part[i][0], part[i][1]);
        f(first + 8 * D + 8 * i, part[i][2], part[i][3]);
    }
}

template <int D> __device__ __forceinline__ void clear_part(Part<D>& part) {
#pragma unroll
    for (int i = 0; i < Span<D>::kPieces; ++i) part[i][0] = part[i][1] = part[i][2] = part[i][3] = 0.0f;
}

// Where the segments of a job meet. Slot 0 holds the state after the first segment, slot i what segment i adds. Each
// group has flags of its own.
template <int D> struct Exchange {
    static constexpr int kFloats = kGroups * Span<D>::kPieces * 4 * kGroup;  // of a slot
    float* slots;
    unsigned* flags;
    int group;
    __device__ __forceinline__ Exchange(const AttentionParams& p, const Cut& cut, const Place& at, int group)
        : slots(cut.states + static_cast<int64_t>(at.job) * cut.segments * kFloats
                + group * (Span<D>::kPieces * 4 * kGroup) + 4 * opaque(threadIdx.x % kGroup)),
          flags(p.sync + 2 + at.job * cut.segments * kGroups + group),
          group(group) {}

    __device__ __forceinline__ void publish(int segment, const Part<D>& part) const {
        float* to = slots + static_cast<int64_t>(segment) * kFloats;
#pragma unroll
        for (int n = 0; n < Span<D>::kPieces; ++n)
            *reinterpret_cast<float4*>(to + n * (4 * kGroup)) =
                make_float4(part[n][0], part[n][1], part[n][2], part[n][3]);
        barrier_sync(meeting_of(group), kGroup);  // the release is of all that came before, by whomever
        if (threadIdx.x % kGroup == 0) store_release(flags + segment * kGroups, 1);
    }

    // part = what the `count` segments before have left, `keep` of it per segment. Several slots are under way at a
    // time.
    __device__ __forceinline__ void collect(int count, float keep, Part<D>& part) const {
        constexpr int kAtOnce = 8 / Span<D>::kPieces;
        if (lane_of() < count)
            while (!load_acquire(flags + lane_of() * kGroups)) __nanosleep(20);
        __syncwarp();
        clear_part<D>(part);
#pragma unroll 1
        for (int first = 0; first < count; first += kAtOnce) {
            float4 found[kAtOnce][Span<D>::kPieces];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const float* from = slots + static_cast<int64_t>(min(first + i, count - 1)) * kFloats;
#pragma unroll
                for (int n = 0; n < Span<D>::kPieces; ++n)
                    found[i][n] = __ldcg(reinterpret_cast<const float4*>(from + n * (4 * kGroup)));
            }
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i)
                if (first + i < count)
#pragma unroll
                    for (int n = 0; n < Span<D>::kPieces; ++n) {
                        part[n][0] = fmaf(part[n][0], keep, found[i][n].x);
                        part[n][1] = fmaf(part[n][1], keep, found[i][n].y);
                        part[n][2] = fmaf(part[n][2], keep, found[i][n].z);
                        part[n][3] = fmaf(part[n][3], keep, found[i][n].w);
                    }
        }
    }
};

// The group's columns of the state's copy, times `scale`, as T. Returns the largest magnitudes, of float16.
template <typename T, int D>
__device__ __forceinline__ uint32_t copy_part(const Part<D>& part, float scale, uint32_t tile, int group) {
    using S = Span<D>;
    const int lane = opaque(lane_of());
    const uint32_t start = tile + (S::Tile::start(16 * warp_of() + lane % 16) ^ lane / 16 * 16);
    uint32_t most = 0;
#pragma unroll
    for (int n = 0; n < S::kPieces; n += 2) {
        uint32_t packed[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float(&from)[4] = part[n + i / 2];
            const float by = kUnit<T> != 1.0f ? scale : 1.0f;
            packed[i] = pack<T>(from[i % 2 * 2] * by, from[i % 2 * 2 + 1] * by);
            if (kUnit<T> != 1.0f) most = larger(most, packed[i]);
        }
        stmatrix(S::Tile::piece(start, D, group * S::kPieces + n), packed[0], packed[1], packed[2], packed[3]);
    }
    return most;
}

// The same, in float16 with a scale that it can hold, which the others are told.
template <typename T, int D>
__device__ __forceinline__ void show_part(const Part<D>& part, float& scale, char* memory, uint32_t memory_at,
                                          int group) {
    using S = Span<D>;
    uint32_t most = copy_part<T, D>(part, scale, memory_at + S::kState, group);
    if constexpr (kUnit<T> != 1.0f) {
        while (true) {  // rare: float16 could not hold the state
            const float2 largest = unpack<T>(most);
            const bool over = !(fmaxf(largest.x, largest.y) <= 65504.0f);
            // All know the same, and the compiler that they do.
            const bool again = any_of(meeting_of(group), kGroup, over) && scale > 1e-30f;
            if (!__shfl_sync(~0u, again, 0)) break;
            scale *= 0.0625f;
            most = copy_part<T, D>(part, scale, memory_at + S::kState, group);
        }
        if (threadIdx.x % kGroup == 0) reinterpret_cast<float*>(memory + S::kScales)[group] = scale;
    }
}

// part += (weighted keys)^T values of kRows tokens of a chunk: issues the products.
template <typename T, int D, int kRows>
__device__ __forceinline__ void add_rows(Part<D>& part, uint32_t weighted, uint32_t values, int group) {
    using S = Span<D>;
#pragma unroll
    for (int k = 0; k < kRows / 16; ++k)
        Wgmma<T, S::kColumns>::template shared<1, 1>(part, S::Tile::down(weighted, kChunk, 0, k),
                                                     S::Tile::down(values, kChunk, group * S::kColumns, k), 1);
}

template <int D> __device__ __forceinline__ void fade_part(Part<D>& part, float keep) {
#pragma unroll
    for (int n = 0; n < Span<D>::kPieces; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) part[n][i] *= keep;
}

template <typename T, int D>
__device__ __forceinline__ void read_past(const AttentionParams& p, const Place& at, int group, Part<D>& part) {
    const float* past = p.past_state + at.row * p.past_batch_stride + static_cast<int64_t>(at.first_head) * D * D;
    each_pair<D>(part, group, [&](int i, float& x, float& y) {
        const float2 both = *reinterpret_cast<const float2*>(past + i);
        x = both.x * kStateUnit<T>, y = both.y * kStateUnit<T>;
    });
}
template <typename T, int D>
__device__ __forceinline__ void write_present(const AttentionParams& p, const Place& at, int group, Part<D>& part) {
    float* present = p.present_state + at.row * p.present_batch_stride + static_cast<int64_t>(at.first_head) * D * D;
    each_pair<D>(part, group, [&](int i, float& x, float& y) {
        *reinterpret_cast<float2*>(present + i) = make_float2(x * (1.0f / kStateUnit<T>), y * (1.0f / kStateUnit<T>));
    });
}

}  // namespace dijiang::prefill::hopper::spans
