// RoPE's angles: cosine and sine at any position, without losing bits to a large one.
#pragma once

namespace dijiang {

// inv_freq as turns per token, in two floats: hi + lo = inv_freq / (2 pi) to about 48 bits.
struct Turns {
    float hi, lo;
};

__device__ __forceinline__ Turns turns_per_token(float inv_freq) {
    // 1 / (2 pi) = kHi + kLo; the product's rounding error is recovered by the fused multiply-add.
    constexpr float kHi = 0.15915494f;  // 1/(2 pi), rounded
    constexpr float kLo = 6.4206383e-9f;  // 1/(2 pi) - kHi
    const float hi = inv_freq * kHi;
    return {hi, fmaf(inv_freq, kHi, -hi) + inv_freq * kLo};
}

// The rotary angle of an integer position (exact below 2^24) as a fraction of a turn in about [-0.5, 0.5]:
// the product with hi is exact as an unevaluated sum, so nothing is lost at position 10^6.
__device__ __forceinline__ float rotary_turn(Turns turns, float position) {
    const float whole = position * turns.hi;
    const float rest = fmaf(position, turns.hi, -whole);
    return (whole - rintf(whole)) + fmaf(position, turns.lo, rest);
}

// cos and sin of a fraction of a turn in [-1, 1], to float32's accuracy: Taylor series on an eighth of a turn
// to each side of the nearest quarter, where the first term left out is below 3e-8.
__device__ __forceinline__ void rotary_cos_sin(float turn, float& cosine, float& sine) {
    const float quarters = rintf(4.0f * turn);
    const float x = fmaf(-0.25f, quarters, turn) * 6.2831853f, x2 = x * x;
    float s = fmaf(x2, 2.7557319e-6f, -1.9841270e-4f);  // 1/9!, -1/7!
    s = fmaf(x2, s, 8.3333333e-3f);
    s = fmaf(x2, s, -1.6666667e-1f);
    s = fmaf(x * x2, s, x);
    float c = fmaf(x2, 2.4801587e-5f, -1.3888889e-3f);  // 1/8!, -1/6!
    c = fmaf(x2, c, 4.1666667e-2f);
    c = fmaf(x2, c, -0.5f);
    c = fmaf(x2, c, 1.0f);
    const int quarter = static_cast<int>(quarters);
    const bool odd = (quarter & 1) != 0;
    const float a = odd ? s : c, b = odd ? c : s;  // up to sign, cos and sin
    cosine = ((quarter + 1) & 2) != 0 ? -a : a;
    sine = (quarter & 2) != 0 ? -b : b;
}

}  // namespace dijiang
