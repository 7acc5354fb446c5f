// The producer warps of the fused kernel: features and scores.
#pragma once

#include "fused_shape.cuh"

namespace dijiang::prefill {

constexpr float kLog2e = 1.44269504f;

// Rotates 16 tokens of k and q in shared memory. A lane owns the pairs (i, i + r/2), (i + 1, i + 1 + r/2) of every
// n-th token and turns its angles on by a fixed step from an accurate start.
template <typename T>
__device__ __forceinline__ void rotate_rows(const AttentionParams& p, T* k, T* q, int pitch, int position, bool full) {
    const int half = p.rotary_dim / 2;
    if (half == 0) return;
    const int units = (half + 1) / 2, groups = 32 / units, lane = threadIdx.x % 32;
    const int group = lane / units, i = 2 * (lane - group * units);
    if (group >= groups) return;
    const bool second = i + 1 < half, even = half % 2 == 0;
    const Turns turns[2] = {turns_per_token(p.inv_freq[i]), turns_per_token(p.inv_freq[second ? i + 1 : i])};
    float c[2], s[2], dc[2], ds[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        constexpr float kTwoPi = 6.28318531f;
        const float start = kTwoPi * rotary_turn(turns[j], static_cast<float>(position + group));
        const float step = kTwoPi * rotary_turn(turns[j], static_cast<float>(groups));
        __sincosf(start, &s[j], &c[j]);
        __sincosf(step, &ds[j], &dc[j]);
    }
    for (int t = group; t < 16; t += groups) {
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
            if (tile == 1 && !full) break;
            T* x = (tile ? q : k) + t * pitch + i;
            T* y = x + half;
            if (even) {
                const float2 a = unpack<T>(*reinterpret_cast<const uint32_t*>(x));
                const float2 b = unpack<T>(*reinterpret_cast<const uint32_t*>(y));
                *reinterpret_cast<uint32_t*>(x) = pack<T>(a.x * c[0] - b.x * s[0], a.y * c[1] - b.y * s[1]);
                *reinterpret_cast<uint32_t*>(y) = pack<T>(b.x * c[0] + a.x * s[0], b.y * c[1] + a.y * s[1]);
            } else {
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    if (j == 1 && !second) break;
                    const float a = to_float(x[j]), b = to_float(y[j]);
                    x[j] = from_float<T>(a * c[j] - b * s[j]);
                    y[j] = from_float<T>(b * c[j] + a * s[j]);
                }
            }
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const float next = c[j] * dc[j] - s[j] * ds[j];
            s[j] = s[j] * dc[j] + c[j] * ds[j];
            c[j] = next;
        }
    }
}

// Logits of 16 rows in accumulators -> features times kFeatureUnit, packed as they stand (C and A fragments).
template <typename T, int N>
__device__ __forceinline__ void softmax_rows(float (&x)[N][4], uint32_t (&packed)[N][2], int d) {
    if (d < 8 * N) {
#pragma unroll
        for (int n = 0; n < N; ++n)
            if (8 * n >= d) x[n][0] = x[n][1] = x[n][2] = x[n][3] = -INFINITY;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        float top = x[0][2 * h];
#pragma unroll
        for (int n = 0; n < N; ++n) top = fmaxf(top, fmaxf(x[n][2 * h], x[n][2 * h + 1]));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        const float shift = -top * kLog2e;
        float total = 0.0f;
#pragma unroll
        for (int n = 0; n < N; ++n) {
            x[n][2 * h] = fast_exp2(fmaf(x[n][2 * h], kLog2e, shift));
            x[n][2 * h + 1] = fast_exp2(fmaf(x[n][2 * h + 1], kLog2e, shift));
            total += x[n][2 * h] + x[n][2 * h + 1];
        }
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        const float scale = __fdividef(kFeatureUnit<T>, total);
#pragma unroll
        for (int n = 0; n < N; ++n) packed[n][h] = pack<T>(x[n][2 * h] * scale, x[n][2 * h + 1] * scale);
    }
}

// u P for `kTiles` blocks of 16 rows that are `stride` bytes apart.
template <typename T, int D, int kTiles>
__device__ __forceinline__ void project(float (&sum)[kTiles][D / 8][4], uint32_t rows, uint32_t stride, uint32_t proj) {
    constexpr int kPitch = Shape<D>::kPitch;
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
        for (int n = 0; n < D / 8; ++n) sum[m][n][0] = sum[m][n][1] = sum[m][n][2] = sum[m][n][3] = 0.0f;
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
        uint32_t a[kTiles][4];
#pragma unroll
        for (int m = 0; m < kTiles; ++m) ldmatrix(a[m], rows + m * stride + 32 * k);
#pragma unroll
        for (int n = 0; n < D / 16; ++n) {
            uint32_t b[4];
            ldmatrix_trans(b, proj + 2 * (16 * k * kPitch + 16 * n));
#pragma unroll
            for (int m = 0; m < kTiles; ++m) {
                mma<T>(sum[m][2 * n], a[m], b[0], b[1]);
                mma<T>(sum[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// One warp: decay terms of a chunk. Tokens past the end neither fade nor write.
__device__ __forceinline__ void write_terms(const ChunkTerms& out, const Terms (&terms)[2]) {
    const int lane = threadIdx.x % 32;
    float total[2] = {terms[0].log_decay * kLog2e, terms[1].log_decay * kLog2e};
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
        out.weight[t] = exp2f(end - total[j]) * terms[j].gain;
        out.read[t] = terms[j].read_scale;
    }
}

template <typename T, int D>
__device__ __forceinline__ void produce(const AttentionParams& p, const Place& at, char* shared, int unit, int warp) {
    using S = Shape<D>;
    constexpr int N = D / 8, kPitch = S::kPitch, kMembers = 32 * S::kWarps;
    char* memory = shared + S::kProj + unit * S::kHead;
    const int lane = threadIdx.x % 32, d = p.head_dim, head = at.first_head + unit;
    const int g = lane / 4, c = 2 * (lane % 4), row0 = 16 * warp;
    T* raw = reinterpret_cast<T*>(memory + S::kRaw) + row0 * kPitch;  // this warp's rows of k; q's are a tile further
    T* features = reinterpret_cast<T*>(memory + S::kFeatures);
    T* scores = reinterpret_cast<T*>(memory + S::kScores);
    const uint32_t raw_at = shared_address(raw), proj_at = shared_address(shared) + lane_by_row(kPitch);

    const auto load = [&](int chunk, bool full) {
        const int first = chunk * kChunk + row0, own = opaque(head);
        const T* source = static_cast<const T*>(p.qkv) + at.row * p.qkv_batch_stride;
        const T* k_source = source + (p.num_heads + own / (p.num_heads / p.num_kv_heads)) * d;
        const T* q_source = source + own * d;
#pragma unroll 1
        for (int i = lane; i < 2 * D; i += 32) {  // 16 rows of D / 8 vectors
            const int t = i / (D / 8), v = i % (D / 8) * 8;
            const bool there = first + t < at.length && v < d;
            const int64_t from = there ? (first + t) * p.qkv_token_stride + v : 0;
            const uint32_t to = raw_at + 2 * (t * kPitch + v);
            copy_async(to, k_source + from, there);
            if (full) copy_async(to + S::kTile, q_source + from, there);
        }
        commit_copies();
    };

    bool started = false;
    int parity = 0;
    for (int walk = at.segment + 1 < at.segments ? 1 : 2; walk <= 2; ++walk) {
        const bool full = walk == 2;
        if (at.first_chunk < at.last_chunk) load(at.first_chunk, full);
        for (int chunk = at.first_chunk; chunk < at.last_chunk; ++chunk) {
            wait_copies<0>();
            __syncwarp();
            rotate_rows<T>(p, raw, raw + kChunk * kPitch, kPitch, at.position + chunk * kChunk + row0, full);
            __syncwarp();
            uint32_t fk[N][2], fq[N][2];
            const uint32_t rows = raw_at + lane_by_row(kPitch);
            if constexpr (S::kTogether) {
                if (full) {
                    float sum[2][N][4];
                    project<T, D, 2>(sum, rows, S::kTile, proj_at);
                    __syncwarp();
                    if (chunk + 1 < at.last_chunk) load(chunk + 1, full);
                    softmax_rows<T, N>(sum[0], fk, d);
                    softmax_rows<T, N>(sum[1], fq, d);
                } else {
                    float sum[1][N][4];
                    project<T, D, 1>(sum, rows, S::kTile, proj_at);
                    __syncwarp();
                    if (chunk + 1 < at.last_chunk) load(chunk + 1, full);
                    softmax_rows<T, N>(sum[0], fk, d);
                }
            } else {
                float sum[1][N][4];
                project<T, D, 1>(sum, rows, S::kTile, proj_at);
                softmax_rows<T, N>(sum[0], fk, d);
                if (full) {
                    project<T, D, 1>(sum, rows + S::kTile, S::kTile, proj_at);
                    softmax_rows<T, N>(sum[0], fq, d);
                }
                __syncwarp();
                if (chunk + 1 < at.last_chunk) load(chunk + 1, full);
            }

            Terms terms[2] = {{0.0f, 0.0f, 0.0f}, {0.0f, 0.0f, 0.0f}};
            if (warp == 0) {
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const int t = chunk * kChunk + lane + 32 * j;
                    if (t < at.length) terms[j] = token_terms(p, head, static_cast<int64_t>(at.position) + t);
                }
            }
            if (started) barrier_sync(kEmpty + 3 * unit, kMembers);
            started = true;
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    T* to = features + (row0 + g + 8 * h) * kPitch + 8 * n + c;
                    *reinterpret_cast<uint32_t*>(to) = fk[n][h];
                    if (full) *reinterpret_cast<uint32_t*>(to + kChunk * kPitch) = fq[n][h];
                }
            }
            const ChunkTerms decay(memory, S::kTerms, parity);
            if (warp == 0) write_terms(decay, terms);
            barrier_sync(kProduced + 3 * unit, 32 * S::kProducers);
            if (full) {
                const uint32_t keys = shared_address(features) + lane_by_column(kPitch);
                const float total[2] = {decay.total[row0 + g], decay.total[row0 + g + 8]};
                for (int j = 0; j <= warp; ++j) {  // 16 earlier tokens at a time
                    float sum[2][4] = {};
#pragma unroll
                    for (int k = 0; k < D / 16; ++k) {
                        uint32_t b[4];
                        ldmatrix(b, keys + 2 * (16 * j * kPitch + 16 * k));
                        const uint32_t a[4] = {fq[2 * k][0], fq[2 * k][1], fq[2 * k + 1][0], fq[2 * k + 1][1]};
                        mma<T>(sum[0], a, b[0], b[1]);
                        mma<T>(sum[1], a, b[2], b[3]);
                    }
#pragma unroll
                    for (int n = 0; n < 2; ++n) {
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
            barrier_arrive(kFull + 3 * unit, kMembers);
            parity ^= 1;
        }
    }
}

}  // namespace dijiang::prefill
