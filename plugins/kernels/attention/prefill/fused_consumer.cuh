// The consumer warps of the fused kernel: state, read-out and what follows it.
#pragma once

#include "attention/prefill/fused_norm.cuh"
#include "attention/prefill/fused_state.cuh"

namespace dijiang::prefill {

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

// A consumer warp: kColumns value columns of one head of its block.
template <typename T, int D> struct Consumer {
    using S = Shape<D>;
    const AttentionParams& p;
    const Cut& cut;
    const Place& at;
    char *shared, *memory;  // the block's, and its head's part of it
    int unit, warp;
    int d, local, column;  // local: its first column of those that the block owns; column: of the head's

    __device__ __forceinline__
    Consumer(const AttentionParams& p, const Cut& cut, const Place& at, char* shared, int unit, int warp)
        : p(p), cut(cut), at(at), shared(shared), memory(shared + S::kProj + unit * cut.head_memory), unit(unit),
          warp(warp), d(S::kWide ? D : p.head_dim), local(warp * S::kColumns),
          column(S::kWide ? at.first_column + local : local) {}

    __device__ __forceinline__ int head() const { return at.first_head + (S::kMostHeads == 1 ? 0 : opaque(unit)); }
    __device__ __forceinline__ T* tile(int offset) const {
        return reinterpret_cast<T*>(memory + opaque(offset)) + local;
    }
    // Where its head's state begins. D itself where it is the size: of the member, which becomes a constant later,
    // nvcc makes a 64-bit address for each element instead of one for all, and D = 256 has no registers left for it.
    template <typename F> __device__ __forceinline__ F* state_of(F* states, int64_t batch_stride) const {
        const int size = S::kWide ? D : d;
        return states + at.row * batch_stride + static_cast<int64_t>(head()) * size * size;
    }
    __device__ __forceinline__ const float* past_state() const { return state_of(p.past_state, p.past_batch_stride); }
    __device__ __forceinline__ float* present_state() const {
        return state_of(p.present_state, p.present_batch_stride);
    }
    __device__ __forceinline__ Exchange<D> exchange() const {
        return Exchange<D>(p, cut, at, opaque(unit) * S::kConsumers + warp);
    }

    // 64 tokens of this warp's columns; zeros past the end.
    __device__ __forceinline__ void
    load(int chunk, T* to, const void* tensor, int64_t batch_stride, int64_t stride, int first) const {
        constexpr int kVectors = S::kColumns / 8, kPitch = S::kValuePitch;
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
    }
    __device__ __forceinline__ void load_values(int chunk) const {
        const int kv = at.kv_head[S::kMostHeads == 1 ? 0 : unit];
        load(chunk, tile(S::kValues), p.qkv, p.qkv_batch_stride, p.qkv_token_stride,
             (p.num_heads + p.num_kv_heads + kv) * d + column);
    }
    __device__ __forceinline__ void load_gates(int chunk) const {
        load(chunk, tile(S::kGate), p.gate, p.gate_batch_stride, p.gate_token_stride, head() * d + column);
    }

    // A row without tokens: its state goes over as it is.
    __device__ __forceinline__ void carry_over() const {
        const float4* past = reinterpret_cast<const float4*>(past_state());
        float4* present = reinterpret_cast<float4*>(present_state());
        if (past != present && at.segment == 0 && at.first_column == 0)
            for (int i = warp * 32 + fresh_lane(); i < d * d / 4; i += 32 * S::kConsumers) present[i] = past[i];
    }

    // What the first walk starts from: the past in the first segment, else nothing.
    __device__ __forceinline__ void begin(StateTile<D>& state) const {
        clear_state(state);
        if (at.segment == 0) {
            const float* past = past_state();
            each_element<D>(state, d, column, [&](int i, float& x) { x = past[i] * kFeatureUnit<T>; });
            if (at.segments > 1) store_slot<D>(exchange().slot(0), state);
        }
    }

    // What the second walk starts from: the past and what the segments before this one have added to it.
    __device__ __forceinline__ void join_segments(StateTile<D>& state) const {
        if (at.segment == 0) {
            add_slot<D>(exchange().slot(0), 0.0f, state);
        } else {
            clear_state(state);
            for (int i = 0; i < at.segment; ++i) {
                const Exchange<D> others = exchange();
                await_flag(others.flags + i * others.members);
                const float keep = fast_exp2(__ldcg(others.decays + i * others.members));
                add_slot<D>(others.slot(i + 1), keep, state);
            }
        }
    }

    // For others to join: what this segment adds, and its log2 decay.
    __device__ __forceinline__ void publish_segment(const StateTile<D>& state, float log2_decay) const {
        const Exchange<D> others = exchange();
        store_slot<D>(others.slot(at.segment + 1), state);
        if (fresh_lane() == 0) others.decays[at.segment * others.members] = log2_decay;
        raise_flag(others.flags + at.segment * others.members);
    }

    // o of a chunk, normalised and gated into the gates' tile, or raw to the workspace. `back` undoes the state's
    // scale.
    __device__ __forceinline__ void read_out(const StateTile<D>& state, const ChunkTerms& decay, uint32_t query_at,
                                             uint32_t score_at, uint32_t value_at, float back, int chunk,
                                             int step) const {
#pragma unroll 1
        for (int first = 0; first < kChunk; first += 16 * S::kReadTiles) {
            ReadOut<D> out;
            read_state<T, D>(state, query_at + 2 * first * S::kPitch, decay.fade + first, back, out);
            read_chunk<T, D>(score_at + 2 * first * S::kScorePitch, value_at, first / 16, out);
            if (cut.raw) {
                store_raw<D>(p, cut, at, out, decay.read, 1.0f / kFeatureUnit<T>, head(), column, chunk, first);
            } else {
                if (cut.set > 1 && p.table_rows) scale_rows(out, decay.read + first);
                normalise<T, D>(p, cut, at, shared, tile(S::kGate), out, decay.epsilon, unit, local, step & 1, first);
            }
        }
    }
};

template <typename T, int D>
__device__ __forceinline__ void
consume(const AttentionParams& p, const Cut& cut, const Place& at, char* shared, int unit, int warp) {
    using S = Shape<D>;
    constexpr int kMembers = 32 * S::kWarps;
    constexpr bool kHalf = kFeatureUnit<T> != 1.0f;  // float16: mind its range
    constexpr float kUnit = kFeatureUnit<T>;
    const Consumer<T, D> me(p, cut, at, shared, unit, warp);
    if (at.length == 0) {
        me.carry_over();
        return;
    }
    StateTile<D> state;  // transposed: [value, feature], times kUnit
    me.begin(state);
    float ratio = 1.0f;  // state = S kUnit ratio
    for (int walk = at.segment + 1 < at.segments ? 1 : 2; walk <= 2; ++walk) {
        const bool full = walk == 2;
        me.load_values(at.first_chunk);
        if (full && !cut.raw) me.load_gates(at.first_chunk);
        if (full && at.segments > 1) me.join_segments(state);
        float running = 0.0f;  // walk 1: log2 decay so far; walk 2: a bound on |state|, for float16
        float& bound = running;
        if (kHalf && full) bound = largest_of<D>(state);

        for (int chunk = at.first_chunk; chunk < at.last_chunk; ++chunk) {
            const int step = at.step(chunk, full);
            // Where stages take turns there is one head: their barriers are those of a second head otherwise.
            const int stage = cut.stages == 2 ? step & 1 : 0, meeting = 3 * (unit + stage);
            barrier_sync(kFull + meeting, kMembers);
            const uint32_t memory_at = shared_address(me.memory) + stage * S::kStage;
            const uint32_t key_at = memory_at + S::kFeatures + lane_by_row(S::kPitch), query_at = key_at + S::kTile;
            const uint32_t score_at = memory_at + S::kScores + lane_by_row(S::kScorePitch);
            const ChunkTerms decay(me.memory, S::kTerms, step);
            if (full) {
                if (kHalf && bound > 65000.0f) {  // rare: float16 could not hold the state
                    const float factor = power_below(bound);
                    scale_state(state, factor);
                    bound *= factor;
                    ratio *= factor;
                }
            }
            wait_copies<0>();
            __syncwarp();
            const uint32_t value_at = shared_address(me.tile(S::kValues)) + lane_by_column(S::kValuePitch);
            if (full) {
                const float back = kHalf ? reciprocal(ratio) * (1.0f / kUnit) : 1.0f;
                me.read_out(state, decay, query_at, score_at, value_at, back, chunk, step);
            }

            // state = e^A state + (weight v)^T phi(k)
            const float keep = decay.fade[kChunk - 1];
            if (!full) running += decay.total[kChunk - 1];
            scale_state(state, keep);
            const uint32_t largest = add_chunk<T, D>(state, decay, key_at, value_at, ratio);
            if (kHalf && full) {
                const float2 most = unpack<T>(largest);
                bound = bound * keep + warp_max(fmaxf(most.x, most.y)) * (kChunk * kUnit);
            }
            __syncwarp();
            const bool more = chunk + 1 < at.last_chunk;
            if (step + cut.stages < at.steps) barrier_arrive(kEmpty + meeting, kMembers);
            if (more) me.load_values(chunk + 1);
            if (full && !cut.raw) {
                store_rows<T, D>(p, at, me.tile(S::kGate), me.head(), me.column, chunk);
                __syncwarp();
                if (more) me.load_gates(chunk + 1);
            }
        }
        if (!full) me.publish_segment(state, running);
    }
    if (at.segment == at.segments - 1) {
        const float back = 1.0f / (kUnit * ratio);
        float* present = me.present_state();
        each_element<D>(state, me.d, me.column, [&](int i, float& x) { present[i] = x * back; });
    }
}

}  // namespace dijiang::prefill
