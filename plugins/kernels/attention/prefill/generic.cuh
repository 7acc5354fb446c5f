// Prefill for any head size and type in plain float32 arithmetic: three kernels with run-time sizes.
//   features   phi(q) and phi(k) of every token            -> workspace [B, L, H + Hkv, d]
//   scan       chunked linear attention, one block per (row, head, 64 value columns) -> raw o [B, L, H d]
//   norm.cuh   GroupNorm and gate
#pragma once

#include "attention/rotary.cuh"
#include "attention/terms.cuh"
#include "device/elements.cuh"
#include "device/math.cuh"

namespace dijiang::prefill {

constexpr int kFeatureRows = 32;   // tokens per block of the feature kernel
constexpr int kScanTokens = 32;    // tokens per chunk of the scan
constexpr int kScanColumns = 64;   // value columns per block of the scan
constexpr int kGenericThreads = 256;

// A row of the workspace is padded so that neighbouring rows start in different banks.
__host__ __device__ constexpr int padded(int d) { return d + 4; }

inline size_t feature_shared_bytes(int d) { return 2 * sizeof(float) * kFeatureRows * padded(d); }

inline size_t scan_shared_bytes(int d) {
    return sizeof(float) * (2 * kScanTokens * padded(d)                  // features
                            + kScanTokens * kScanColumns                 // values
                            + kScanTokens * (kScanTokens + 1)            // scores
                            + 8 * 8 * kScanColumns                       // partial outputs of 8 warps
                            + 5 * kScanTokens);                          // decay terms
}

__device__ __forceinline__ int valid_tokens(const AttentionParams& p, int row) {
    const int length = p.seq_lens[row];
    return length < 0 ? 0 : (length > p.length ? p.length : length);
}

// grid (ceil(L / 32), H + Hkv, B)
template <typename T>
__global__ void __launch_bounds__(kGenericThreads) features_kernel(const AttentionParams p, float* features) {
    const int d = p.head_dim, pitch = padded(d), row = blockIdx.z, head = blockIdx.y;
    const int first = blockIdx.x * kFeatureRows;
    const int rows = min(kFeatureRows, valid_tokens(p, row) - first);
    if (rows <= 0) return;
    extern __shared__ float shared[];
    float* u = shared;
    float* logits = shared + kFeatureRows * pitch;
    const T* source = static_cast<const T*>(p.qkv) + row * p.qkv_batch_stride + head * d;
    const int half = p.rotary_dim / 2;
    for (int i = threadIdx.x; i < kFeatureRows * d; i += kGenericThreads) {
        const int t = i / d, c = i - t * d;
        float x = 0.0f;
        if (t < rows) {
            const T* token = source + (first + t) * p.qkv_token_stride;
            x = to_float(token[c]);
            if (c < 2 * half) {
                const bool upper = c >= half;
                const float partner = to_float(token[upper ? c - half : c + half]);
                float cosine, sine;
                const Turns turns = turns_per_token(p.inv_freq[upper ? c - half : c]);
                rotary_cos_sin(rotary_turn(turns, static_cast<float>(p.positions[row] + first + t)), cosine, sine);
                x = x * cosine + (upper ? partner : -partner) * sine;
            }
        }
        u[t * pitch + c] = x;
    }
    __syncthreads();
    // Each thread: 8 tokens x up to 4 features, 64 apart.
    const int lane = threadIdx.x % 64, t0 = threadIdx.x / 64 * 8;
    float sum[8][4] = {};
    for (int i = 0; i < d; ++i) {
        float weight[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int f = lane + 64 * j;
            weight[j] = f < d ? to_float(from_float<T>(p.proj[i * d + f])) : 0.0f;
        }
#pragma unroll
        for (int t = 0; t < 8; ++t) {
            const float x = u[(t0 + t) * pitch + i];
#pragma unroll
            for (int j = 0; j < 4; ++j) sum[t][j] = fmaf(x, weight[j], sum[t][j]);
        }
    }
#pragma unroll
    for (int t = 0; t < 8; ++t)
#pragma unroll
        for (int j = 0; j < 4; ++j)
            if (lane + 64 * j < d) logits[(t0 + t) * pitch + lane + 64 * j] = sum[t][j];
    __syncthreads();
    const int warp = threadIdx.x / 32, in_warp = threadIdx.x % 32;
    for (int t = warp; t < rows; t += kGenericThreads / 32) {
        float* line = logits + t * pitch;
        float top = -INFINITY, total = 0.0f;
        for (int f = in_warp; f < d; f += 32) top = fmaxf(top, line[f]);
        for (int s = 16; s; s >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, s));
        for (int f = in_warp; f < d; f += 32) total += line[f] = expf(line[f] - top);
        for (int s = 16; s; s >>= 1) total += __shfl_xor_sync(~0u, total, s);
        const float scale = 1.0f / total;
        float* out = features + ((static_cast<int64_t>(row) * p.length + first + t) * (p.num_heads + p.num_kv_heads)
                                 + head) * d;
        for (int f = in_warp; f < d; f += 32) out[f] = line[f] * scale;
    }
}

// grid (ceil(d / 64), H, B). A thread owns two value columns (64 by lanes) and d/8 features (by warps) of the state.
template <typename T>
__global__ void __launch_bounds__(kGenericThreads, 1)
scan_kernel(const AttentionParams p, const float* features, float* raw) {
    constexpr int C = kScanTokens, V = kScanColumns;
    const int d = p.head_dim, pitch = padded(d), row = blockIdx.z, head = blockIdx.y;
    const int length = valid_tokens(p, row), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int own = d / 8, f0 = warp * own;  // features of this warp
    const int column = blockIdx.x * V + 2 * lane;
    const bool active = column < d;
    extern __shared__ float shared[];
    float* fq = shared;
    float* fk = fq + C * pitch;
    float* value = fk + C * pitch;
    float* score = value + C * V;
    float* part = score + C * (C + 1);
    float* fade = part + 8 * 8 * V;  // cumulative log decay
    float* gain = fade + C;
    float* read = gain + C;
    float* log_decay = read + C;
    float* rest = log_decay + C;  // log decay of the tokens after this one

    const int64_t state_at = static_cast<int64_t>(head) * d * d + column;
    const float* past = p.past_state + row * p.past_batch_stride + state_at;
    float* present = p.present_state + row * p.present_batch_stride + state_at;
    float2 state[32];
#pragma unroll
    for (int j = 0; j < 32; ++j)
        if (j < own && active) state[j] = *reinterpret_cast<const float2*>(past + (f0 + j) * static_cast<int64_t>(d));
        else state[j] = make_float2(0.0f, 0.0f);

    const int heads = p.num_heads, all_heads = heads + p.num_kv_heads, kv = head / (heads / p.num_kv_heads);
    const float* features_row = features + static_cast<int64_t>(row) * p.length * all_heads * d;
    const T* values = static_cast<const T*>(p.qkv) + row * p.qkv_batch_stride + (all_heads + kv) * d + blockIdx.x * V;
    float* raw_row = raw + static_cast<int64_t>(row) * p.length * heads * d + head * d + blockIdx.x * V;

    for (int first = 0; first < length; first += C) {
        const int rows = min(C, length - first);
        __syncthreads();
        for (int i = threadIdx.x; i < C * d; i += kGenericThreads) {
            const int t = i / d, f = i - t * d;
            const float* token = features_row + static_cast<int64_t>(first + t) * all_heads * d + f;
            fq[t * pitch + f] = t < rows ? token[head * d] : 0.0f;
            fk[t * pitch + f] = t < rows ? token[(heads + kv) * d] : 0.0f;
        }
        for (int i = threadIdx.x; i < C * V; i += kGenericThreads) {
            const int t = i / V, c = i % V;
            const bool there = t < rows && blockIdx.x * V + c < d;
            value[i] = there ? to_float(values[(first + t) * p.qkv_token_stride + c]) : 0.0f;
        }
        if (threadIdx.x < C) {
            const int t = threadIdx.x;
            Terms terms = {0.0f, 0.0f, 0.0f};
            if (t < rows) terms = token_terms(p, head, static_cast<int64_t>(p.positions[row]) + first + t);
            float total = terms.log_decay, after = __shfl_down_sync(~0u, terms.log_decay, 1);
            if (t == 31) after = 0.0f;
            for (int s = 1; s < 32; s <<= 1) {
                const float x = __shfl_up_sync(~0u, total, s), y = __shfl_down_sync(~0u, after, s);
                if (t >= s) total += x;
                if (t + s < 32) after += y;
            }
            rest[t] = after;
            fade[t] = total;
            gain[t] = terms.gain;
            read[t] = terms.read_scale;
            log_decay[t] = terms.log_decay;
        }
        __syncthreads();
        for (int i = threadIdx.x; i < C * C; i += kGenericThreads) {
            const int t = i / C, s = i % C;
            float sum = 0.0f;
            if (s <= t && t < rows) {
                for (int f = 0; f < d; f += 4) {
                    const float4 a = *reinterpret_cast<const float4*>(fq + t * pitch + f);
                    const float4 b = *reinterpret_cast<const float4*>(fk + s * pitch + f);
                    sum = fmaf(a.x, b.x, fmaf(a.y, b.y, fmaf(a.z, b.z, fmaf(a.w, b.w, sum))));
                }
                // The sum over s+1..t, not a difference of sums from the chunk's start: exact for small gaps.
                float gap = 0.0f;
                for (int j = s + 1; j <= t; ++j) gap += log_decay[j];
                sum *= expf(gap) * gain[s];
            }
            score[t * (C + 1) + s] = sum;
        }
        for (int t0 = 0; t0 < rows; t0 += 8) {
            float2 sum[8] = {};
#pragma unroll
            for (int j = 0; j < 32; ++j) {
                if (j < own) {
#pragma unroll
                    for (int t = 0; t < 8; ++t) {
                        const float x = fq[(t0 + t) * pitch + f0 + j];
                        sum[t].x = fmaf(x, state[j].x, sum[t].x);
                        sum[t].y = fmaf(x, state[j].y, sum[t].y);
                    }
                }
            }
#pragma unroll
            for (int t = 0; t < 8; ++t)
                *reinterpret_cast<float2*>(part + (warp * 8 + t) * V + 2 * lane) = sum[t];
            __syncthreads();
            for (int i = threadIdx.x; i < 8 * V; i += kGenericThreads) {
                const int t = i / V, c = i % V;
                float o = 0.0f;
                for (int w = 0; w < 8; ++w) o += part[(w * 8 + t) * V + c];
                o *= expf(fade[t0 + t]);
                for (int s = 0; s <= t0 + t; ++s) o = fmaf(score[(t0 + t) * (C + 1) + s], value[s * V + c], o);
                if (t0 + t < rows && blockIdx.x * V + c < d)
                    raw_row[static_cast<int64_t>(first + t0 + t) * heads * d + c] = o * read[t0 + t];
            }
            __syncthreads();
        }
        const float keep = expf(fade[C - 1]);
#pragma unroll
        for (int j = 0; j < 32; ++j) state[j] = make_float2(state[j].x * keep, state[j].y * keep);
        for (int s = 0; s < rows; ++s) {
            const float weight = expf(rest[s]) * gain[s];
            const float2 v = *reinterpret_cast<const float2*>(value + s * V + 2 * lane);
            const float2 write = make_float2(v.x * weight, v.y * weight);
#pragma unroll
            for (int j = 0; j < 32; ++j) {
                if (j < own) {
                    const float x = fk[s * pitch + f0 + j];
                    state[j].x = fmaf(x, write.x, state[j].x);
                    state[j].y = fmaf(x, write.y, state[j].y);
                }
            }
        }
    }
    if (!active || (length == 0 && present == past)) return;
#pragma unroll
    for (int j = 0; j < 32; ++j)
        if (j < own) *reinterpret_cast<float2*>(present + (f0 + j) * static_cast<int64_t>(d)) = state[j];
}

}  // namespace dijiang::prefill
