// The consumer warps of the fused kernel: state, read-out and what follows it.
#pragma once

#include "attention/prefill/fused_norm.cuh"

namespace dijiang::prefill {

template <int D> using StateTile = float[Shape<D>::kColumns / 16][D / 8][4];

// Calls f(address of a state's element [feature, value], register) for the elements that this lane holds.
template <int D, typename F>
__device__ __forceinline__ void each_element(StateTile<D>& state, int size, int column, F&& f) {
    const int d = Shape<D>::kWide ? D : opaque(size);  // or every element's offset would be kept between two uses
    const int lane = fresh_lane(), g = lane / 4, c = 2 * (lane % 4);
#pragma unroll
    for (int m = 0; m < Shape<D>::kColumns / 16; ++m)
#pragma unroll
        for (int n = 0; n < D / 8; ++n)
            if (8 * n < d && column + 16 * m < d) {
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    f((8 * n + c + i % 2) * d + column + 16 * m + g + 8 * (i / 2), state[m][n][i]);
            }
}

// A slot of the workspace holds a warp's registers, 128 floats at a time.
template <int D> __device__ __forceinline__ void store_slot(float* slot, const StateTile<D>& state) {
    slot += 4 * fresh_lane();
#pragma unroll
    for (int m = 0; m < Shape<D>::kColumns / 16; ++m)
#pragma unroll
        for (int n = 0; n < D / 8; ++n)
            *reinterpret_cast<float4*>(slot + (m * (D / 8) + n) * 128) =
                make_float4(state[m][n][0], state[m][n][1], state[m][n][2], state[m][n][3]);
}

// state = state * keep + slot, past the first-level cache: another block may have written it.
template <int D> __device__ __forceinline__ void add_slot(const float* slot, float keep, StateTile<D>& state) {
    slot += 4 * fresh_lane();
#pragma unroll
    for (int m = 0; m < Shape<D>::kColumns / 16; ++m)
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
            const float4 x = __ldcg(reinterpret_cast<const float4*>(slot + (m * (D / 8) + n) * 128));
            state[m][n][0] = fmaf(state[m][n][0], keep, x.x);
            state[m][n][1] = fmaf(state[m][n][1], keep, x.y);
            state[m][n][2] = fmaf(state[m][n][2], keep, x.z);
            state[m][n][3] = fmaf(state[m][n][3], keep, x.w);
        }
}

// Where the consumer warps of a job's segments meet. Slot 0 keeps the past (present may be the same memory), slot
// i + 1 what segment i adds to it.
template <int D> struct Exchange {
    float *slots, *decays;
    unsigned* flags;
    int members;  // consumer warps per block; decays and flags of one segment are neighbours

    __device__ __forceinline__ Exchange(const AttentionParams& p, const Cut& cut, const Place& at, int member) {
        using S = Shape<D>;
        const int jobs = gridDim.x / cut.segments;
        members = cut.set * S::kConsumers;
        const int64_t first = static_cast<int64_t>(at.job) * cut.segments * members + member;
        const int64_t all = static_cast<int64_t>(jobs) * cut.segments * members;
        slots = cut.states + first * (S::kColumns * D);
        decays = cut.states + all * (S::kColumns * D) + first;
        flags = p.sync + 2 + first;
    }
    __device__ __forceinline__ float* slot(int i) const {
        return slots + static_cast<int64_t>(i) * members * (Shape<D>::kColumns * D);
    }
};

__device__ __forceinline__ void raise_flag(unsigned* flag) {
    __threadfence();
    __syncwarp();
    if (fresh_lane() == 0) asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(flag) : "memory");
}
__device__ __forceinline__ void await_flag(const unsigned* flag) {
    unsigned raised = 0;
    while (true) {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(raised) : "l"(flag) : "memory");
        if (raised) break;
        __nanosleep(40);
    }
    __syncwarp();
}

// The power of two that brings numbers of magnitude up to `bound` below 2^12: room to grow up to float16's 2^16.
__device__ __forceinline__ float power_below(float bound) {
    const int exponent = static_cast<int>(__float_as_uint(bound) >> 23 & 255) - 127;  // bound < 2^(exponent + 1)
    return __uint_as_float((127 + max(11 - exponent, -120)) << 23);
}

// out = e^A phi(q) S for the tokens of `out`; `back` undoes the state's scale.
template <typename T, int D>
__device__ __forceinline__ void read_state(const StateTile<D>& state, uint32_t query_at, const float* fade, float back,
                                           ReadOut<D>& out) {
    using S = Shape<D>;
    constexpr int M = S::kColumns / 16, V = S::kColumns / 8, R = S::kReadTiles;
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
        for (int n = 0; n < V; ++n) out[r][n][0] = out[r][n][1] = out[r][n][2] = out[r][n][3] = 0.0f;
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
        uint32_t b[V][2];
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h)
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    b[2 * m + h][i] = pack<T>(state[m][2 * k + i][2 * h], state[m][2 * k + i][2 * h + 1]);
#pragma unroll
        for (int r = 0; r < R; ++r) {
            uint32_t a[4];
            ldmatrix(a, query_at + 2 * (16 * r * S::kPitch + 16 * k));
#pragma unroll
            for (int n = 0; n < V; ++n) mma<T>(out[r][n], a, b[n][0], b[n][1]);
        }
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
        const int g = fresh_lane() / 4;
        const float upper = fade[16 * r + g] * back, lower = fade[16 * r + g + 8] * back;
#pragma unroll
        for (int n = 0; n < V; ++n) {
            out[r][n][0] *= upper, out[r][n][1] *= upper;
            out[r][n][2] *= lower, out[r][n][3] *= lower;
        }
    }
}

// out += scores v for the tokens of `out`, which begin at the chunk's tile `first`.
template <typename T, int D>
__device__ __forceinline__ void read_chunk(uint32_t score_at, uint32_t value_at, int first, ReadOut<D>& out) {
    using S = Shape<D>;
    constexpr int M = S::kColumns / 16, R = S::kReadTiles;
    const auto add = [&](int k, int row) {  // tokens of tile k, for rows from `row` on
        uint32_t b[M][4];
#pragma unroll
        for (int m = 0; m < M; ++m) ldmatrix_trans(b[m], value_at + 2 * (16 * k * S::kValuePitch + 16 * m));
#pragma unroll
        for (int r = 0; r < R; ++r) {
            if (r < row) continue;
            uint32_t a[4];
            ldmatrix(a, score_at + 2 * (16 * r * S::kScorePitch + 16 * k));
#pragma unroll
            for (int m = 0; m < M; ++m) {
                mma<T>(out[r][2 * m], a, b[m][0], b[m][2]);
                mma<T>(out[r][2 * m + 1], a, b[m][1], b[m][3]);
            }
        }
    };
    if constexpr (R < 4) {
#pragma unroll 1
        for (int k = 0; k < first; ++k) add(k, 0);
    }
#pragma unroll
    for (int k = 0; k < R; ++k) add(first + k, k);
}

template <typename T, int D>
__device__ __forceinline__ void
consume(const AttentionParams& p, const Cut& cut, const Place& at, char* shared, int unit, int warp) {
    using S = Shape<D>;
    constexpr int kPitch = S::kValuePitch, M = S::kColumns / 16, F = D / 8, R = S::kReadTiles;
    constexpr int kMembers = 32 * S::kWarps;
    constexpr bool kHalf = kFeatureUnit<T> != 1.0f;  // float16: mind its range
    constexpr float kUnit = kFeatureUnit<T>;
    char* memory = shared + S::kProj + unit * cut.head_memory;
    const int d = S::kWide ? D : p.head_dim;
    const auto head = [&] { return at.first_head + (S::kMostHeads == 1 ? 0 : opaque(unit)); };
    const int local = warp * S::kColumns;
    const int column = S::kWide ? at.first_column + local : local;
    const auto tile = [&](int offset) { return reinterpret_cast<T*>(memory + opaque(offset)) + local; };
    // 64 tokens of this warp's columns; zeros past the end.
    const auto load = [&](int chunk, T* to, const void* tensor, int64_t batch_stride, int64_t stride, int first) {
        constexpr int kVectors = S::kColumns / 8;
        const int mine = fresh_lane(), v = mine % kVectors * 8, count = column + v < d ? at.length - chunk * kChunk : 0;
        const T* from = static_cast<const T*>(tensor) + at.row * batch_stride + first;
        const T* token = from + (chunk * kChunk + mine / kVectors) * stride + v;
        uint32_t at_shared = shared_address(to + mine / kVectors * kPitch + v);
#pragma unroll S::kLoadUnroll
        for (int t = mine / kVectors; t < kChunk; t += 32 / kVectors) {
            copy_async(at_shared, t < count ? token : from, t < count);
            token += 32 / kVectors * stride;
            at_shared += 32 / kVectors * 2 * kPitch;
        }
        commit_copies();
    };
    const auto load_values = [&](int chunk) {
        const int kv = at.kv_head[S::kMostHeads == 1 ? 0 : unit];
        load(chunk, tile(S::kValues), p.qkv, p.qkv_batch_stride, p.qkv_token_stride,
             (p.num_heads + p.num_kv_heads + kv) * d + column);
    };
    const auto load_gates = [&](int chunk) {
        load(chunk, tile(S::kGate), p.gate, p.gate_batch_stride, p.gate_token_stride, head() * d + column);
    };

    const auto past_state = [&] {
        return p.past_state + at.row * p.past_batch_stride + static_cast<int64_t>(head()) * d * d;
    };
    const auto present_state = [&] {
        return p.present_state + at.row * p.present_batch_stride + static_cast<int64_t>(head()) * d * d;
    };
    if (at.length == 0) {
        const float4* past = reinterpret_cast<const float4*>(past_state());
        float4* present = reinterpret_cast<float4*>(present_state());
        if (past != present && at.segment == 0 && at.first_column == 0)
            for (int i = warp * 32 + fresh_lane(); i < d * d / 4; i += 32 * S::kConsumers) present[i] = past[i];
        return;
    }

    // Slot 0 of a job keeps the past (its present may be the same memory); slot i + 1 what segment i adds.
    const auto exchange = [&] { return Exchange<D>(p, cut, at, opaque(unit) * S::kConsumers + warp); };

    StateTile<D> state;  // transposed: [value, feature], times kUnit
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < F; ++n) state[m][n][0] = state[m][n][1] = state[m][n][2] = state[m][n][3] = 0.0f;
    if (at.segment == 0) {
        const float* past = past_state();
        each_element<D>(state, d, column, [&](int i, float& x) { x = past[i] * kUnit; });
        if (at.segments > 1) store_slot<D>(exchange().slot(0), state);
    }

    float ratio = 1.0f;  // state = S kUnit ratio
    for (int walk = at.segment + 1 < at.segments ? 1 : 2; walk <= 2; ++walk) {
        const bool full = walk == 2;
        load_values(at.first_chunk);
        if (full && !cut.raw) load_gates(at.first_chunk);
        if (full && at.segments > 1) {
            if (at.segment == 0) {
                add_slot<D>(exchange().slot(0), 0.0f, state);
            } else {
#pragma unroll
                for (int m = 0; m < M; ++m)
#pragma unroll
                    for (int n = 0; n < F; ++n) state[m][n][0] = state[m][n][1] = state[m][n][2] = state[m][n][3] = 0.0f;
                for (int i = 0; i < at.segment; ++i) {
                    const Exchange<D> others = exchange();
                    await_flag(others.flags + i * others.members);
                    const float keep = fast_exp2(__ldcg(others.decays + i * others.members));
                    add_slot<D>(others.slot(i + 1), keep, state);
                }
            }
        }
        float running = 0.0f;  // walk 1: log2 decay so far; walk 2: a bound on |state|, for float16
        float& bound = running;
        if (kHalf && full) {
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int n = 0; n < F; ++n)
#pragma unroll
                    for (int i = 0; i < 4; ++i) bound = fmaxf(bound, fabsf(state[m][n][i]));
            bound = warp_max(bound);
        }

        for (int chunk = at.first_chunk; chunk < at.last_chunk; ++chunk) {
            const int step = at.step(chunk, full);
            // Where stages take turns there is one head: their barriers are those of a second head otherwise.
            const int stage = cut.stages == 2 ? step & 1 : 0, meeting = 3 * (unit + stage);
            barrier_sync(kFull + meeting, kMembers);
            const uint32_t memory_at = shared_address(memory) + stage * S::kStage;
            const uint32_t key_at = memory_at + S::kFeatures + lane_by_row(S::kPitch), query_at = key_at + S::kTile;
            const uint32_t score_at = memory_at + S::kScores + lane_by_row(S::kScorePitch);
            const ChunkTerms decay(memory, S::kTerms, step);
            if (full) {
                if (kHalf && bound > 65000.0f) {  // rare: float16 could not hold the state
                    const float factor = power_below(bound);
#pragma unroll
                    for (int m = 0; m < M; ++m)
#pragma unroll
                        for (int n = 0; n < F; ++n)
#pragma unroll
                            for (int i = 0; i < 4; ++i) state[m][n][i] *= factor;
                    bound *= factor;
                    ratio *= factor;
                }
            }
            wait_copies<0>();
            __syncwarp();
            const uint32_t value_at = shared_address(tile(S::kValues)) + lane_by_column(kPitch);
            if (full) {
                const float back = kHalf ? reciprocal(ratio) * (1.0f / kUnit) : 1.0f;
#pragma unroll 1
                for (int first = 0; first < kChunk; first += 16 * R) {
                    ReadOut<D> out;
                    read_state<T, D>(state, query_at + 2 * first * S::kPitch, decay.fade + first, back, out);
                    read_chunk<T, D>(score_at + 2 * first * S::kScorePitch, value_at, first / 16, out);
                    if (cut.raw) {
                        store_raw<D>(p, cut, at, out, decay.read, 1.0f / kUnit, head(), column, chunk, first);
                    } else {
                        if (cut.set > 1 && p.table_rows) scale_rows(out, decay.read + first);
                        normalise<T, D>(p, cut, at, shared, tile(S::kGate), out, decay.epsilon, unit, local, step & 1,
                                        first);
                    }
                }
            }

            // state = e^A state + (weight v)^T phi(k)
            const float keep = decay.fade[kChunk - 1];
            if (!full) running += decay.total[kChunk - 1];
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int n = 0; n < F; ++n)
#pragma unroll
                    for (int i = 0; i < 4; ++i) state[m][n][i] *= keep;
            uint32_t largest = 0;
#pragma unroll 1
            for (int k = 0; k < 4; ++k) {
                const uint32_t* weights = static_cast<const uint32_t*>(decay.weight) + 8 * k + fresh_lane() % 4;
                const uint32_t early = weights[0], late = weights[4];
                uint32_t a[M][4];
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    ldmatrix_trans(a[m], value_at + 2 * (16 * k * kPitch + 16 * m));
#pragma unroll
                    for (int i = 0; i < 4; ++i) a[m][i] = multiply<T>(a[m][i], i < 2 ? early : late);
                }
                if (kHalf && ratio != 1.0f) {
                    const uint32_t scale = pack<T>(ratio, ratio);
#pragma unroll
                    for (int m = 0; m < M; ++m)
#pragma unroll
                        for (int i = 0; i < 4; ++i) a[m][i] = multiply<T>(a[m][i], scale);
                }
                if (kHalf) {
#pragma unroll
                    for (int m = 0; m < M; ++m)
#pragma unroll
                        for (int i = 0; i < 4; ++i) largest = larger(largest, a[m][i]);
                }
#pragma unroll
                for (int n = 0; n < F / 2; ++n) {
                    uint32_t b[4];
                    ldmatrix_trans(b, key_at + 2 * (16 * k * S::kPitch + 16 * n));
#pragma unroll
                    for (int m = 0; m < M; ++m) {
                        mma<T>(state[m][2 * n], a[m], b[0], b[1]);
                        mma<T>(state[m][2 * n + 1], a[m], b[2], b[3]);
                    }
                }
            }
            if (kHalf && full) {
                const float2 most = unpack<T>(largest);
                bound = bound * keep + warp_max(fmaxf(most.x, most.y)) * (kChunk * kUnit);
            }
            __syncwarp();
            const bool more = chunk + 1 < at.last_chunk;
            if (step + cut.stages < at.steps) barrier_arrive(kEmpty + meeting, kMembers);
            if (more) load_values(chunk + 1);
            if (full && !cut.raw) {
                store_rows<T, D>(p, at, tile(S::kGate), head(), column, chunk);
                __syncwarp();
                if (more) load_gates(chunk + 1);
            }
        }
        if (!full) {
            const Exchange<D> others = exchange();
            store_slot<D>(others.slot(at.segment + 1), state);
            if (fresh_lane() == 0) others.decays[at.segment * others.members] = running;
            raise_flag(others.flags + at.segment * others.members);
        }
    }
    if (at.segment == at.segments - 1) {
        const float back = 1.0f / (kUnit * ratio);
        float* present = present_state();
        each_element<D>(state, d, column, [&](int i, float& x) { present[i] = x * back; });
    }
}

}  // namespace dijiang::prefill
