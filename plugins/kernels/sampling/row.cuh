// One row of logits as a block sees it: scores, their order, their softmax weights.
#pragma once

#include <cfloat>
#include <cstdint>

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
    // Of an exponent that has weight; may be 0 for the least.
    __device__ uint64_t weight_at(float exponent) const { return __float2ull_rn(__fmul_rn(exp2f(exponent), scale)); }
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

// This block's part of a row: `per_warp` ids for each of its warps, one after another.
struct Part {
    const float* logits;
    const uint32_t* allowed;  // or null
    const uint32_t* seen;     // null where there is no penalty
    double penalty;
    float* staged;            // this part's scores in shared memory, or null: computed anew each time
    int begin, end, per_warp;

    // What the filters see of a logit; -inf if it may not be chosen.
    __device__ float prepare(float logit, int id) const {
        const uint32_t bit = 1u << (id % 32);
        if (allowed != nullptr && !(__ldg(allowed + id / 32) & bit)) return -INFINITY;
        if (seen == nullptr || !(__ldg(seen + id / 32) & bit) || !(fabsf(logit) < INFINITY)) return logit;
        return penalised(logit, penalty);
    }

    // Calls visit(id, score) for first <= id < last, in all lanes together and in the ids' order within each; ids from
    // `last` on come with -inf. Rolled up, with one score ahead: the code is long, and a launch that fetches less of it is
    // faster.
    template <typename Visit> __device__ void each(int first, int last, Visit&& visit) const {
        int id = first + static_cast<int>(threadIdx.x % 32);
        float next = score_at(id, last);
#pragma unroll 1
        for (int base = first; base < last; base += 32, id += 32) {
            const float read = next;
            next = score_at(id + 32, last);
            visit(id, staged != nullptr || id >= last ? read : prepare(read, id));
        }
    }
    // As it is kept, or in memory.
    __device__ __forceinline__ float score_at(int id, int last) const {
        if (id >= last) return -INFINITY;
        return staged != nullptr ? staged[id - begin] : __ldg(logits + id);
    }

    // The same for this warp's share of the part.
    template <typename Visit> __device__ void each(Visit&& visit) const {
        const int first = begin + static_cast<int>(threadIdx.x / 32) * per_warp;
        each(first, min(first + per_warp, end), visit);
    }

    // Logits as they are in memory, with several of a lane on their way.
    template <typename Visit> __device__ void each_read(int first, int last, Visit&& visit) const {
        constexpr int kAhead = 8;
#pragma unroll 1
        for (int base = first; base < last; base += 32 * kAhead) {
            float read[kAhead];
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                const int id = base + 32 * i + static_cast<int>(threadIdx.x % 32);
                read[i] = id < last ? __ldg(logits + id) : -INFINITY;
            }
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                if (base + 32 * i >= last) break;
                visit(base + 32 * i + static_cast<int>(threadIdx.x % 32), read[i]);
            }
        }
    }
};

}  // namespace dijiang
