// What the recurrence takes from the model at a token: decay, gain, read scale.
#pragma once

#include "attention/attention.h"

namespace dijiang {

// A term of the recurrence never forgets more than this in one token (e^-30 is nothing in float32), so that
// sums over a chunk stay finite. docs/mathematics.md, section on tables.
constexpr float kLeastLogDecay = -30.0f;

// Just above float32's smallest normal number: what GroupNorm's epsilon may shrink to
// (reference/attention.py).
constexpr float kLeastEpsilon = 1e-37f;

// a, b and r of one token: S = e^a S + b k v, o = r q S.
struct Terms {
    float log_decay, gain, read_scale;
};

__device__ __forceinline__ Terms token_terms(const AttentionParams& p, int head, int64_t position) {
    if (p.table_rows == 0) return {fmaxf(p.log_decay[head], kLeastLogDecay), 1.0f, 1.0f};
    const int64_t last = p.table_rows - 1;
    const int64_t at = (position < last ? position : last) * p.num_heads + head;
    return {fmaxf(p.log_decay[at], kLeastLogDecay), p.gain[at], p.read_scale[at]};
}

}  // namespace dijiang
