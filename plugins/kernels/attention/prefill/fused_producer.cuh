// The producer warps of the fused kernel: features and scores.
#pragma once

#include "attention/prefill/fused_shape.cuh"
#include "attention/rotary.cuh"
#include "attention/terms.cuh"

namespace dijiang::prefill {

// All threads: P, rounded to T and padded with zeros.
template <typename T, int D, int kUnroll> __device__ __forceinline__ void load_proj(const AttentionParams& p, T* proj) {
#pragma unroll kUnroll
    for (int i = threadIdx.x; i < D * D / 4; i += blockDim.x) {
        const int r = i / (D / 4), c = i % (D / 4) * 4;
        const bool there = r < p.head_dim && c < p.head_dim;
        const float4 x = there ? *reinterpret_cast<const float4*>(p.proj + r * p.head_dim + c)
                               : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        *reinterpret_cast<uint2*>(proj + r * Shape<D>::kPitch + c) = make_uint2(pack<T>(x.x, x.y), pack<T>(x.z, x.w));
    }
}

// Rotation of 16 tokens: a lane owns the pairs (i, i + r/2), (i + 1, i + 1 + r/2) of every `groups`-th token.
struct RotaryLane {
    int i, group, groups;  // group >= groups: idle
    __device__ __forceinline__ RotaryLane(int half, int first_pair) {
        const int units = max(1, min(32, (half - first_pair + 1) / 2)), lane = threadIdx.x % 32;
        groups = first_pair < half ? 32 / units : 0;
        group = lane / units;
        i = first_pair + 2 * (lane - group * units);
    }
};

__device__ __forceinline__ float2 rotation_by(float turn) {
    constexpr float kTwoPi = 6.28318531f;
    float2 r;
    __sincosf(kTwoPi * turn, &r.y, &r.x);
    return r;
}

// All threads: per pair of dimensions, turns per token and the rotation from one of a lane's tokens to its next.
__device__ __forceinline__ void prepare_rotation(const AttentionParams& p, float4* turns) {
    for (int i = threadIdx.x; i < p.rotary_dim / 2; i += blockDim.x) {
        const RotaryLane mine(p.rotary_dim / 2, i / 64 * 64);
        const Turns t = turns_per_token(p.inv_freq[i]);
        const float2 step = rotation_by(rotary_turn(t, static_cast<float>(mine.groups)));
        turns[i] = make_float4(t.hi, t.lo, step.x, step.y);
    }
}

// Rotates 16 rows in shared memory, from an accurate start per call by steps.
template <typename T>
__device__ __forceinline__ void
rotate_rows(const RotaryLane& mine, int half, const float4* turns, T* rows, int pitch, int position) {
    if (mine.group >= mine.groups) return;
    const int i = mine.i;
    const bool second = i + 1 < half, even = half % 2 == 0;
    float2 r[2], step[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        const float4 turn = turns[second ? i + j : i];
        r[j] = rotation_by(rotary_turn({turn.x, turn.y}, static_cast<float>(position + mine.group)));
        step[j] = make_float2(turn.z, turn.w);
    }
#pragma unroll 2
    for (int t = mine.group; t < 16; t += mine.groups) {
        T* row = rows + t * pitch + i;
        float2 a, b;
        if (even) {
            a = unpack<T>(*reinterpret_cast<const uint32_t*>(row));
            b = unpack<T>(*reinterpret_cast<const uint32_t*>(row + half));
        } else {
            a = make_float2(to_float(row[0]), second ? to_float(row[1]) : 0.0f);
            b = make_float2(to_float(row[half]), second ? to_float(row[half + 1]) : 0.0f);
        }
        const float2 x = make_float2(a.x * r[0].x - b.x * r[0].y, a.y * r[1].x - b.y * r[1].y);
        const float2 y = make_float2(b.x * r[0].x + a.x * r[0].y, b.y * r[1].x + a.y * r[1].y);
        if (even) {
            *reinterpret_cast<uint32_t*>(row) = pack<T>(x.x, x.y);
            *reinterpret_cast<uint32_t*>(row + half) = pack<T>(y.x, y.y);
        } else {
            row[0] = from_float<T>(x.x), row[half] = from_float<T>(y.x);
            if (second) row[1] = from_float<T>(x.y), row[half + 1] = from_float<T>(y.y);
        }
#pragma unroll
        for (int j = 0; j < 2; ++j)
            r[j] = make_float2(r[j].x * step[j].x - r[j].y * step[j].y, r[j].y * step[j].x + r[j].x * step[j].y);
    }
}

// Logits of 16 rows in accumulators -> features times kFeatureUnit, packed as they stand (C and A fragments).
template <typename T, int N>
__device__ __forceinline__ void softmax_rows(float (&x)[N][4], uint32_t (&packed)[N][2], int d) {
    constexpr int R = 2;  // rows of a lane
    if (d < 8 * N) {
        asm volatile("");  // a branch, not a selection per element
#pragma unroll
        for (int n = 0; n < N; ++n)
            if (8 * n >= d) x[n][0] = x[n][1] = x[n][2] = x[n][3] = -INFINITY;
    }
    float top[R], total[R];
#pragma unroll
    for (int i = 0; i < R; ++i) {
        top[i] = x[0][2 * i];
#pragma unroll
        for (int n = 0; n < N; ++n) top[i] = fmaxf(top[i], fmaxf(x[n][2 * i], x[n][2 * i + 1]));
    }
#pragma unroll
    for (int s = 1; s <= 2; s *= 2)
#pragma unroll
        for (int i = 0; i < R; ++i) top[i] = fmaxf(top[i], __shfl_xor_sync(~0u, top[i], s));
#pragma unroll
    for (int i = 0; i < R; ++i) {
        const float shift = -top[i] * kLog2E;
        total[i] = 0.0f;
#pragma unroll
        for (int n = 0; n < N; ++n) {
            float &a = x[n][2 * i], &b = x[n][2 * i + 1];
            a = fast_exp2(fmaf(a, kLog2E, shift));
            b = fast_exp2(fmaf(b, kLog2E, shift));
            total[i] += a + b;
        }
    }
#pragma unroll
    for (int s = 1; s <= 2; s *= 2)
#pragma unroll
        for (int i = 0; i < R; ++i) total[i] += __shfl_xor_sync(~0u, total[i], s);
#pragma unroll
    for (int i = 0; i < R; ++i) {
        const float scale = kFeatureUnit<T> * reciprocal(total[i]);
#pragma unroll
        for (int n = 0; n < N; ++n)
            packed[n][i] = pack<T>(x[n][2 * i] * scale, x[n][2 * i + 1] * scale);
    }
}

// u P for 16 rows.
template <typename T, int D>
__device__ __forceinline__ void project(float (&sum)[D / 8][4], uint32_t rows, uint32_t proj) {
    constexpr int kPitch = Shape<D>::kPitch;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) sum[n][0] = sum[n][1] = sum[n][2] = sum[n][3] = 0.0f;
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
        uint32_t a[4];
        ldmatrix(a, rows + 32 * k);
#pragma unroll
        for (int n = 0; n < D / 16; ++n) {
            uint32_t b[4];
            ldmatrix_trans(b, proj + 2 * (16 * k * kPitch + 16 * n));
            mma<T>(sum[2 * n], a, b[0], b[1]);
            mma<T>(sum[2 * n + 1], a, b[2], b[3]);
        }
    }
}

// One warp: decay terms of a chunk. Tokens past the end neither fade nor write.
template <typename T>
__device__ __forceinline__ void write_terms(const ChunkTerms& out, const Terms (&terms)[2], const float (&peak)[2], float epsilon) {
    const int lane = threadIdx.x % 32;
    float total[2] = {terms[0].log_decay * kLog2E, terms[1].log_decay * kLog2E};
#pragma unroll
    for (int s = 1; s < 32; s <<= 1) {
        const float x = __shfl_up_sync(~0u, total[0], s), y = __shfl_up_sync(~0u, total[1], s);
        if (lane >= s) total[0] += x, total[1] += y;
    }
    total[1] += __shfl_sync(~0u, total[0], 31);
    const float end = __shfl_sync(~0u, total[1], 31);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        const int t = lane + 32 * j;
        out.total[t] = total[j];
        out.gain[t] = terms[j].gain;
        out.fade[t] = exp2f(total[j]);
        static_cast<T*>(out.weight)[t] = from_float<T>(exp2f(end - total[j]) * terms[j].gain);
        // With R the largest read scale of the set and r = R x: (r o - mean) / sqrt(var + eps) is the same of x o with
        // eps / R^2, so nothing overflows. A set of one head has x = 1 and leaves the sign to epsilon's; `raw` needs r.
        const float r = terms[j].read_scale;
        constexpr float kSquare = kFeatureUnit<T> * kFeatureUnit<T>;
        const float most = peak[j] > 0.0f ? peak[j] : fabsf(r);
        out.read[t] = peak[j] > 0.0f ? r / peak[j] : r;
        out.epsilon[t] = copysignf(kSquare * fmaxf(epsilon / (most * most), kLeastEpsilon), peak[j] > 0.0f ? 1.0f : r);
    }
}

// Decayed causal scores of 16 tokens against those up to them.
template <typename T, int D>
__device__ __forceinline__ void
write_scores(const ChunkTerms& decay, uint32_t queries, uint32_t keys, T* scores, int warp) {
    using S = Shape<D>;
    const int lane = threadIdx.x % 32, g = lane / 4, c = 2 * (lane % 4), row0 = 16 * (warp % 4);
    const float total[2] = {decay.total[row0 + g], decay.total[row0 + g + 8]};
#pragma unroll 1
    for (int j = warp / 4 * 2; j <= warp % 4; j += S::kProducers / 2) {  // 32 earlier tokens: enough products in flight
        float sum[4][4] = {};
#pragma unroll
        for (int k = 0; k < D / 16; ++k) {
            uint32_t a[4];
            ldmatrix(a, queries + 32 * k);
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                uint32_t b[4];
                ldmatrix(b, keys + 2 * (16 * (j + n) * S::kPitch + 16 * k));
                mma<T>(sum[2 * n], a, b[0], b[1]);
                mma<T>(sum[2 * n + 1], a, b[2], b[3]);
            }
        }
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const int s = 16 * j + 8 * n + c;
            const float2 before = *reinterpret_cast<const float2*>(decay.total + s);
            const float2 gain = *reinterpret_cast<const float2*>(decay.gain + s);
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int t = row0 + g + 8 * h;
                const float x = s <= t ? fast_exp2(total[h] - before.x) * gain.x : 0.0f;
                const float y = s + 1 <= t ? fast_exp2(total[h] - before.y) * gain.y : 0.0f;
                constexpr float kUnit = 1.0f / kFeatureUnit<T>;
                *reinterpret_cast<uint32_t*>(scores + t * S::kScorePitch + s) =
                    pack<T>(sum[n][2 * h] * (x * kUnit), sum[n][2 * h + 1] * (y * kUnit));
            }
        }
    }
}

// Factors of the chunk's tokens lane and lane + 32.
__device__ __forceinline__ void read_terms(const AttentionParams& p, const Place& at, int head, int chunk,
                                           Terms (&terms)[2], float (&peak)[2]) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        const int t = chunk * kChunk + threadIdx.x % 32 + 32 * j;
        terms[j] = {0.0f, 0.0f, 0.0f};
        peak[j] = 0.0f;
        if (t >= at.length) continue;
        const int64_t position = static_cast<int64_t>(at.position) + t;
        terms[j] = token_terms(p, head, position);
        for (int i = 0; i < at.set && at.set > 1; ++i)
            peak[j] = fmaxf(peak[j], fabsf(token_terms(p, at.first_head + i, position).read_scale));
    }
}

// One warp: all of a chunk's terms.
template <typename T>
__device__ __forceinline__ void make_terms(const AttentionParams& p, const Place& at, int head, int chunk,
                                           const ChunkTerms& out) {
    Terms terms[2];
    float peak[2];
    read_terms(p, at, head, chunk, terms, peak);
    write_terms<T>(out, terms, peak, p.epsilon);
}

template <typename T, int D>
__device__ __forceinline__ void produce(const AttentionParams& p, const Cut& cut, const Place& at, char* shared, int unit, int warp) {
    using S = Shape<D>;
    constexpr int N = D / 8, kPitch = S::kPitch, kMembers = 32 * S::kWarps;
    constexpr int kApart = S::kProducers / 4;  // a warp makes tile 0, k, and tile 1, q, or one of them
    char* memory = shared + S::kProj + unit * cut.head_memory;
    const int lane = threadIdx.x % 32, d = p.head_dim, head = at.first_head + unit;
    const int g = lane / 4, c = 2 * (lane % 4), row0 = 16 * (warp % 4);
    const int half = p.rotary_dim / 2;
    T* raw = reinterpret_cast<T*>(memory + S::kRaw) + row0 * kPitch;  // this warp's rows of k; q's are a tile further
    const uint32_t raw_at = shared_address(raw), proj_at = shared_address(shared) + lane_by_row(kPitch);

    const auto load = [&](int chunk, int tile) {
        constexpr int kVectors = D / 8, kStep = 32 / kVectors;  // per row; rows per turn
        const int t0 = lane / kVectors, v = lane % kVectors * 8, first = chunk * kChunk + row0;
        const int count = v < d ? at.length - first : 0;
        const T* source = static_cast<const T*>(p.qkv) + at.row * p.qkv_batch_stride;
        const T* from = source + (first + t0) * p.qkv_token_stride
                        + (tile ? head : p.num_heads + at.kv_head[unit]) * d + v;
        const int64_t step = kStep * p.qkv_token_stride;
        uint32_t to = raw_at + tile * S::kTile + 2 * (t0 * kPitch + v);
        if (t0 < kStep) {
#pragma unroll 2
            for (int t = t0; t < 16; t += kStep) {
                copy_async(to, t < count ? from : source, t < count);
                from += step;
                to += kStep * 2 * kPitch;
            }
        }
        commit_copies();
    };

    const RotaryLane rotary(half, 0);
    int step = 0;  // chunks so far
    for (int walk = at.segment + 1 < at.segments ? 1 : 2; walk <= 2; ++walk) {
        const bool full = walk == 2;
        if (at.first_chunk < at.last_chunk)
            for (int tile = warp / 4; tile < walk; tile += kApart) load(at.first_chunk, tile);
        for (int chunk = at.first_chunk; chunk < at.last_chunk; ++chunk) {
            wait_copies<0>();
            __syncwarp();
            const bool more = chunk + 1 < at.last_chunk;
            const int stage = cut.stages == 2 ? step & 1 : 0, meeting = 3 * (unit + stage);
            T* features = reinterpret_cast<T*>(memory + S::kFeatures + stage * S::kStage);
            bool waiting = step >= cut.stages;
            // From raw rows to features.
            const auto process = [&](int tile) {
                rotate_rows<T>(rotary, half, at.turns, raw + tile * kChunk * kPitch, kPitch,
                               at.position + chunk * kChunk + row0);
                __syncwarp();
                float sum[N][4];
                uint32_t packed[N][2];
                project<T, D>(sum, raw_at + tile * S::kTile + lane_by_row(kPitch), proj_at);
                __syncwarp();
                if (more) load(chunk + 1, tile);
                softmax_rows<T, N>(sum, packed, d);
#pragma unroll
                for (int n = 0; n < N; ++n) keep_before(packed[n][0]), keep_before(packed[n][1]);
                if (waiting) barrier_sync(kEmpty + meeting, kMembers);
                waiting = false;
                T* to = features + (tile * kChunk + row0 + g) * kPitch + c;
#pragma unroll
                for (int n = 0; n < N; ++n)
#pragma unroll
                    for (int h = 0; h < 2; ++h)
                        *reinterpret_cast<uint32_t*>(to + 8 * h * kPitch + 8 * n) = packed[n][h];
            };
#pragma unroll 1
            for (int tile = warp / 4; tile < walk; tile += kApart) process(tile);
            if (waiting) barrier_sync(kEmpty + meeting, kMembers);
            const ChunkTerms decay(memory, S::kTerms, step);
            if (warp == 0) make_terms<T>(p, at, head, chunk, decay);
            barrier_sync(kProduced + 3 * unit, 32 * S::kProducers);
            if (full) {
                const uint32_t tile = shared_address(features);
                const uint32_t queries = tile + S::kTile + 2 * row0 * kPitch + lane_by_row(kPitch);
                write_scores<T, D>(decay, queries, tile + lane_by_column(kPitch),
                                   reinterpret_cast<T*>(memory + S::kScores + stage * S::kStage), warp);
            }
            barrier_arrive(kFull + meeting, kMembers);
            ++step;
        }
    }
}

}  // namespace dijiang::prefill
