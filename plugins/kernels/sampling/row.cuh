// One row of logits as a block sees it: scores, their order, their softmax weights.
#pragma once

#include <cfloat>
#include <cstdint>

#include "device/math.cuh"
#include "device/registers.cuh"
#include "device/shared.cuh"
#include "sampling/team.cuh"

namespace dijiang {

constexpr uint32_t kLowestKey = 0x007FFFFF;  // of -inf

// Floats as integers of the same order; -0 equals 0.
__device__ __forceinline__ uint32_t key_of(float score) {
    const uint32_t bits = __float_as_uint(__fadd_rn(score, 0.0f));
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float score_of(uint32_t key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key);
}

// A token's place in the order of all: greater is better, and of equal scores the lower id is. No two are equal, and
// none is 0.
__device__ __forceinline__ uint64_t place_of(float score, int id) {
    return uint64_t{key_of(score)} << 32 | ~static_cast<uint32_t>(id);
}
__device__ __forceinline__ int id_of_place(uint64_t place) { return static_cast<int>(~static_cast<uint32_t>(place)); }
__device__ __forceinline__ float score_of_place(uint64_t place) { return score_of(static_cast<uint32_t>(place >> 32)); }

// exp((score - best) / temperature) as an integer, 2^weight_bits for the best. Sums of integers do not depend on their
// order; a whole vocabulary's stays below 2^63.
struct Softmax {
    float best, rate, scale, least_exponent;  // below that nothing has weight

    static __device__ Softmax make(float best, float rate, int vocabulary) {
        const int bits = weight_bits(vocabulary);
        return {best, rate, __uint_as_float(static_cast<uint32_t>(127 + bits) << 23), -static_cast<float>(bits + 1)};
    }

    // log2 of the weight relative to the best, <= 0. Rounded step by step, so that it is the same wherever it is asked.
    __device__ float exponent(float score) const { return __fmul_rn(__fsub_rn(score, best), rate); }
    __device__ bool has_weight(float exponent) const { return exponent >= least_exponent; }
    // Of an exponent; may be 0 for the least that has weight, and is for what has none: that is below 2^-(bits + 1) by
    // more than exponentials are off.
    __device__ uint64_t weight_at(float exponent) const {
        return __float2ull_rn(__fmul_rn(fast_exp2(exponent), scale));
    }
    __device__ uint64_t weight(float score) const {
        const float e = exponent(score);
        return has_weight(e) ? weight_at(e) : 0;
    }
};

// Out of line: a division in double precision is a hundred instructions, and few tokens take this way.
__device__ __noinline__ float penalised(float logit, double penalty) {
    const double wide = logit > 0 ? logit / penalty : logit * penalty;
    return static_cast<float>(fmin(fmax(wide, -double{FLT_MAX}), double{FLT_MAX}));
}

// This block's part of a row: `per_warp` ids for each of its warps, one after another. Made anew for each pass, from
// what the compiler cannot know to be the same, since registers are scarce between them.
struct Part {
    const float* logits;      // of the row; this and the next two only where they are read
    const uint32_t* allowed;  // or null
    const uint32_t* seen;     // null where there is no penalty
    double penalty;
    int kept;  // where this lane's scores are in shared memory, in bytes, -inf behind the last; 0: they are not
    int first, last, count;  // this warp's ids, and how many times 32 they are
    int vocabulary;

    // staging: where the block's scores are; 0 if they are not kept. Of a warp's ids `most` from `skipped` on, or
    // fewer.
    static __device__ Part make(const Team& team, int per_warp, int vocabulary, int staging, int warp, int skipped,
                                int most) {
        Part it{};
        skipped = min(skipped, per_warp);
        const int start = (team.rank() * block_warps() + warp) * per_warp;
        it.set_ids(start + skipped, min(most, per_warp - skipped), vocabulary);
        it.kept = staging > 0 ? staging + 4 * (warp * per_warp + skipped + fresh_lane()) : 0;
        return it;
    }
    // 64-bit products: too many instructions for a pass that does not need them.
    __device__ void find_logits(const Team& team, const dijiang_sample_buffers& b) {
        const int64_t row = opaque(static_cast<int>(blockIdx.x)) >> team.bits();
        logits = b.logits + row * b.logits_row_stride;
        if (b.allowed != nullptr) allowed = b.allowed + row * b.allowed_row_stride;
        if (b.seen != nullptr) seen = b.seen + row * b.seen_row_stride;
    }
    __device__ void penalise(double factor) {
        penalty = factor;
        if (factor == 1) seen = nullptr;
    }
    // From `id`, which may lie behind the row: all blocks' ids are not many more than a row has.
    __device__ void set_ids(int id, int per_warp, int row) {
        vocabulary = row;
        first = min(id, row);
        last = min(id + per_warp, row);
        count = (last - first + 31) >> 5;
    }

    // Of the first thread's part.
    __device__ Part of_this_warp(int per_warp) const {
        const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
        Part it = *this;
        it.set_ids(first + warp * per_warp, per_warp, vocabulary);
        if (kept != 0) it.kept += 4 * (warp * per_warp + lane);
        return it;
    }

    __device__ float* scores() const { return reinterpret_cast<float*>(shared_bytes() + kept); }
    __device__ bool masked() const { return allowed != nullptr || seen != nullptr; }

    // What the filters see of a logit; -inf if it may not be chosen.
    __device__ float prepare(float logit, int id) const {
        const uint32_t bit = 1u << (id % 32);
        if (allowed != nullptr && !(__ldg(allowed + id / 32) & bit)) return -INFINITY;
        if (seen == nullptr || !(__ldg(seen + id / 32) & bit) || !(fabsf(logit) < INFINITY)) return logit;
        return penalised(logit, penalty);
    }

    // Calls visit(id, scores) for this warp's ids, in all lanes together and in the ids' order within each; `scores` is
    // an array, of ids that are 32 apart, and what is not there comes with -inf. Several at once where scores are at
    // hand, so that what one waits for the others do not; not all, since the code is long, and a launch that fetches
    // less of it is faster.
    template <typename Visit> __device__ void each(Visit&& visit) const {
        constexpr int kAtOnce = 4;
        int id = first + static_cast<int>(threadIdx.x % 32);
        if (kept != 0 || !masked()) {
            const float* from = scores();
#pragma unroll 1
            for (int i = 0; i < count; i += kAtOnce, id += 32 * kAtOnce, from += 32 * kAtOnce) {
                float some[kAtOnce];
                if (kept != 0) {
#pragma unroll
                    for (int j = 0; j < kAtOnce; ++j) some[j] = count - i > j ? from[32 * j] : -INFINITY;
                } else {
#pragma unroll
                    for (int j = 0; j < kAtOnce; ++j) some[j] = read(id + 32 * j);
                }
                visit(id, some);
            }
        } else {
            each_of_memory(visit);
        }
    }
    // The same, of one at a time.
    template <typename Visit> __device__ void each_one(Visit&& visit) const {
        int id = first + static_cast<int>(threadIdx.x % 32);
        if (kept != 0) {
            const float* from = scores();
#pragma unroll 1
            for (int i = 0; i < count; ++i, id += 32, from += 32) {
                const float one[1] = {*from};
                visit(id, one);
            }
        } else {
            each_of_memory(visit);
        }
    }
    // And of logits that are read again.
    template <typename Visit> __device__ void each_of_memory(Visit&& visit) const {
        constexpr int kAhead = 2;  // on their way
        int id = first + static_cast<int>(threadIdx.x % 32);
        float next[kAhead];
#pragma unroll
        for (int j = 0; j < kAhead; ++j) next[j] = read(id + 32 * j);
#pragma unroll 1
        for (int i = 0; i < count; ++i, id += 32) {
            const float logit = next[0];
#pragma unroll
            for (int j = 1; j < kAhead; ++j) next[j - 1] = next[j];
            next[kAhead - 1] = read(id + 32 * kAhead);
            const float one[1] = {id < last ? prepare(logit, id) : -INFINITY};
            visit(id, one);
        }
    }
    __device__ float read(int id) const { return id < last ? __ldg(logits + id) : -INFINITY; }
    // One of this lane's scores, i from 0 to count - 1.
    __device__ float score(int i) const {
        if (kept != 0) return scores()[32 * i];
        const int id = first + 32 * i + static_cast<int>(threadIdx.x % 32);
        return id < last ? prepare(read(id), id) : -INFINITY;
    }

    // Logits as they are in memory: visit(i, id, logit, there), i from 0 to count - 1 and some more, of which none is
    // there: they come with -inf. Several of a lane are on their way, and the next ones before these are visited.
    template <typename Visit> __device__ void each_read(Visit&& visit) const {
        constexpr int kAhead = 8;
        const int id = first + static_cast<int>(threadIdx.x % 32);
        float some[kAhead], others[kAhead];
        const auto ask = [&](float (&logits_)[kAhead], int i) {
            if (i >= count) return;
#pragma unroll
            for (int j = 0; j < kAhead; ++j) logits_[j] = read(id + 32 * (i + j));
        };
        const auto show = [&](const float (&logits_)[kAhead], int i) {
            if (i >= count) return;
#pragma unroll
            for (int j = 0; j < kAhead; ++j) visit(i + j, id + 32 * (i + j), logits_[j], i + j < count);
        };
        ask(some, 0);
#pragma unroll 1
        for (int i = 0; i < count; i += 2 * kAhead) {
            ask(others, i + kAhead);
            show(some, i);
            ask(some, i + 2 * kAhead);
            show(others, i + kAhead);
        }
    }
};

}  // namespace dijiang
