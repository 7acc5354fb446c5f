// What should a decoding step in one launch look like?
//
// A model's step of one row reads every weight once, so memory's rate is its floor; what lies above the floor is waiting.
// This program walks 24 GPT-NeoX layers (hidden 1024, inner 4096, 16 heads of 64, parallel residual, a 50,304-row
// head, float16) in one persistent launch and varies one thing at a time: how blocks hand values to each other, how far
// weights run ahead, how large copies are, which units multiply, and where attention is hidden.
// The layout of weights is free here, so each block's part is one run of 512-byte units of 8 rows x 32 columns, of
// which lane (g, t) of a warp reads row g, columns 8t to 8t+7: conflict-free, and an operand of mma.m16n8k16 as it is.
// Blocks 0 to 127 own 64 rows of qkv+gate+up and 8 rows of dense+down each, whole: sums have one order, always.
//
//   nvcc -std=c++17 -O3 -gencode=arch=compute_90,code=sm_90 docs/evidence/step-experiment.cu -o step_experiment
//   ./step_experiment results.json
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

constexpr int LAYERS = 24, HIDDEN = 1024, INNER = 4096, HEADS = 16, DIM = 64, VOCABULARY = 50304;
constexpr int BLOCKS = 128, WARPS = 16, THREADS = WARPS * 32;      // consumers; one more warp copies
constexpr int FIRST_UNITS = 256, SECOND_UNITS = 160, LAYER_UNITS = FIRST_UNITS + SECOND_UNITS;  // a block's, a layer
constexpr int HEAD_GROUPS = VOCABULARY / 8, UNIT_BYTES = 512, MAX_SLOTS = 48, RING_BYTES = 192 * 1024;
constexpr int SEGMENTS = 10;
constexpr size_t WEIGHT_UNITS = size_t(LAYERS) * BLOCKS * LAYER_UNITS + size_t(HEAD_GROUPS) * 32;
constexpr double WEIGHT_BYTES = double(WEIGHT_UNITS) * UNIT_BYTES;
constexpr long long POLL_LIMIT = 50'000'000, COPY_LIMIT = 3'000'000'000;   // cycles

enum Sync { NO_WAIT, BARRIER, COUNTERS, TAGGED };     // TAGGED: each 8-byte store carries its value and its epoch
enum Product { NONE, FMA, MMA };
enum Segment { HIDDEN_WAIT, NORM, FIRST, QK_WAIT, ATTENTION, UP_WAIT, DOWN, ATTENTION_WAIT, DENSE, HEAD };
const char* const SEGMENT_NAMES[] = {"hidden-wait", "norm", "first", "qk-wait", "attention",
                                     "up-wait", "down", "attn-wait", "dense", "head"};

struct Model {
    uint4* weights;
    __half *features, *input;                         // P [layer, head, 64, 64]; the embedding's row
    float *bias, *norm, *state, *logits;              // [layer, 9216], [layer + 1, 2, 1024], [layer, head, f, column]
    uint2 *hidden, *up, *qk, *attention;              // {value, tag} slots: 1024 floats, 2048 half pairs, 2048, 1024
    unsigned *counters, *error, *segments;
};
struct Setting {
    unsigned epoch;
    int splits;          // blocks that share a head: 4 (64 blocks do attention) or 8 (all do, 32 rows each)
    int unit_shift;      // units of a chunk, log2
    int slots, flight;   // chunks in the ring, and at most in flight (0: as many as there are)
    int ahead;           // may weights of the next phase be asked for before this one has ended?
    int overlap;         // attention is waited for after the MLP's second product
    int interleaved;     // blocks' parts lie side by side layer by layer, or each block's whole stream in one piece
    int evict_first, nap, dry;                        // dry: no weights at all, only the chain of exchanges
};

// --- instructions -------------------------------------------------------------------------------------------------
__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
__device__ __forceinline__ void mbarrier_init(uint64_t* m, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(m)), "r"(count));
}
__device__ __forceinline__ void mbarrier_expect(uint64_t* m, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(m)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* m) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(m)) : "memory");
}
__device__ __forceinline__ bool mbarrier_done(uint64_t* m, uint32_t parity) {
    uint32_t done;
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done) : "r"(shared_address(m)), "r"(parity) : "memory");
    return done;
}
__device__ __forceinline__ void bulk_copy(void* to, const void* from, uint32_t bytes, uint64_t* m, bool evict_first) {
    if (!evict_first) {
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                         shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(m)) : "memory");
        return;
    }
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
                 ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(m)), "l"(policy) : "memory");
}
__device__ __forceinline__ void meet() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }
__device__ __forceinline__ void count_up(unsigned* c) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(c) : "memory");
}
__device__ __forceinline__ unsigned read_count(const unsigned* c) {
    unsigned v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(c) : "memory");
    return v;
}
__device__ __forceinline__ void publish(uint2* slot, uint32_t value, uint32_t tag) {   // 8 bytes, never torn
    asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(slot), "l"(uint64_t(tag) << 32 | value) : "memory");
}
__device__ __forceinline__ void read_slots(const uint2* slot, uint64_t& a, uint64_t& b) {
    asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];" : "=l"(a), "=l"(b) : "l"(slot) : "memory");
}

// --- mathematics that the kernel and its reference share ----------------------------------------------------------
__device__ __forceinline__ float gelu(float x) { return 0.5f * x * (1.f + erff(x * 0.70710678f)); }
__device__ __forceinline__ float silu(float x) { return x / (1.f + __expf(-x)); }
__device__ __forceinline__ float decay_of(int head) { return 0.9f + 0.006f * head; }
__device__ __forceinline__ uint32_t bits_of(__half2 h) { return *reinterpret_cast<uint32_t*>(&h); }
__device__ __forceinline__ __half2 halves_of(uint32_t u) { return *reinterpret_cast<__half2*>(&u); }
__device__ __forceinline__ float sum_lanes(float v, int lanes) {
    for (int o = 1; o < lanes; o <<= 1) v += __shfl_xor_sync(~0u, v, o);
    return v;
}
__device__ __forceinline__ float max_lanes(float v) {
    for (int o = 1; o < 32; o <<= 1) v = fmaxf(v, __shfl_xor_sync(~0u, v, o));
    return v;
}
__host__ __device__ inline size_t stream_unit(const Setting& s, int block, unsigned unit, unsigned* room) {
    if (unit < unsigned(LAYERS * LAYER_UNITS)) {
        const unsigned layer = unit / LAYER_UNITS, rest = unit % LAYER_UNITS;
        *room = LAYER_UNITS - rest;
        return (s.interleaved ? size_t(layer) * BLOCKS + block : size_t(block) * LAYERS + layer) * LAYER_UNITS + rest;
    }
    *room = ~0u;
    const int first_group = block * (HEAD_GROUPS / BLOCKS) + min(block, HEAD_GROUPS % BLOCKS);
    return size_t(LAYERS) * BLOCKS * LAYER_UNITS + size_t(first_group) * 32 + (unit - LAYERS * LAYER_UNITS);
}
__host__ __device__ inline int head_groups(int block) { return HEAD_GROUPS / BLOCKS + (block < HEAD_GROUPS % BLOCKS); }

// --- the kernel ---------------------------------------------------------------------------------------------------
struct Shared {
    alignas(16) __half normed[HIDDEN], up[INNER], attended[HIDDEN];
    alignas(16) float part[9][WARPS][8];              // eight groups of rows of the first product, one of the second
    float qk[2][DIM], score[2][DIM], value[16], gate[16], readout[WARPS][16], sums[WARPS][2];
    uint64_t full[MAX_SLOTS], empty[MAX_SLOTS];
    unsigned segments[SEGMENTS];
    volatile int open, broken;                        // the phase whose weights may be asked for; a wait has run out
};

// Waits 1 to 4 are for this block's own copies, the others for other blocks. Where one of the latter runs out, the
// error flag says so and this block waits for nobody any more: it goes on to its end, so that no copy is left in flight.
template <class Ready>
__device__ __forceinline__ void await(Ready ready, long long limit, Shared& sm, unsigned* error, unsigned code) {
    if (ready()) return;
    const long long start = clock64();
    while (!ready()) {
        if (code > 4 && sm.broken) return;
        if (clock64() - start < limit) continue;
        if (code <= 4) __trap();                      // impossible, unless this program is wrong
        atomicCAS(error, 0u, code << 16 | blockIdx.x << 8 | 1u);
        sm.broken = 1;
        return;
    }
}

__device__ void copy_weights(const Model& m, const Setting& s, uint8_t* ring, Shared& sm) {
    const unsigned units = LAYERS * LAYER_UNITS + head_groups(blockIdx.x) * 32, per_chunk = 1u << s.unit_shift;
    unsigned slot = 0, parity = 1, old_slot = 0, old_parity = 0;
    for (unsigned at = 0, chunk = 0; at < units; at += per_chunk, ++chunk) {
        if (chunk >= unsigned(s.slots))
            await([&] { return mbarrier_done(&sm.empty[slot], parity); }, COPY_LIMIT, sm, m.error, 1);
        if (s.flight && chunk >= unsigned(s.flight)) {
            await([&] { return mbarrier_done(&sm.full[old_slot], old_parity); }, COPY_LIMIT, sm, m.error, 2);
            if (++old_slot == unsigned(s.slots)) old_slot = 0, old_parity ^= 1;
        }
        if (!s.ahead) {
            const int phase = at < LAYERS * LAYER_UNITS ? 2 * (at / LAYER_UNITS) + (at % LAYER_UNITS >= FIRST_UNITS) : 2 * LAYERS;
            await([&] { return sm.open >= phase; }, COPY_LIMIT, sm, m.error, 3);
        }
        unsigned left = min(per_chunk, units - at), from = at, room;
        uint8_t* to = ring + size_t(slot) * per_chunk * UNIT_BYTES;
        mbarrier_expect(&sm.full[slot], left * UNIT_BYTES);
        while (left) {
            const uint4* source = m.weights + stream_unit(s, blockIdx.x, from, &room) * 32;
            const unsigned now = min(left, room);
            bulk_copy(to, source, now * UNIT_BYTES, &sm.full[slot], s.evict_first);
            left -= now, from += now, to += now * UNIT_BYTES;
        }
        if (++slot == unsigned(s.slots)) slot = 0, parity ^= 1;
    }
}

// A warp's way through its block's stream: every sixteenth unit, from the ring.
struct Cursor {
    const uint8_t* ring;
    Shared& sm;
    unsigned* error;
    unsigned unit, shift, slots, chunk = 0, slot = 0, parity = 0;
    bool landed = false;

    __device__ __forceinline__ const uint4* take() {
        for (; chunk != unit >> shift; ++chunk) {
            landed = false;
            if (++slot == slots) slot = 0, parity ^= 1;
        }
        if (!landed) await([&] { return mbarrier_done(&sm.full[slot], parity); }, COPY_LIMIT, sm, error, 4);
        landed = true;
        const unsigned within = (slot << shift) + (unit & ((1u << shift) - 1));
        return reinterpret_cast<const uint4*>(ring + size_t(within) * UNIT_BYTES) + (threadIdx.x & 31);
    }
    __device__ __forceinline__ void release() {
        unit += WARPS;
        if (unit >> shift == chunk) return;
        __syncwarp();
        if ((threadIdx.x & 31) == 0) mbarrier_arrive(&sm.empty[slot]);
    }
};

template <int PRODUCT>
struct Sum {
    float c[4] = {}, d[4] = {};                       // two chains
    __device__ __forceinline__ void add(uint4 w, uint4 x) {
        if constexpr (PRODUCT == MMA) {               // every row of A is x: row 0 of the result is what counts
            mma(c, x.x, x.y, w.x, w.y);
            mma(d, x.z, x.w, w.z, w.w);
        } else if constexpr (PRODUCT == FMA) {
            const uint32_t a[4] = {w.x, w.y, w.z, w.w}, b[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float2 f = __half22float2(halves_of(a[i])), g = __half22float2(halves_of(b[i]));
                c[0] = fmaf(f.x, g.x, c[0]);
                c[1] = fmaf(f.y, g.y, c[1]);
            }
        }
    }
    __device__ __forceinline__ void mma(float (&r)[4], uint32_t a0, uint32_t a2, uint32_t b0, uint32_t b1) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(r[0]), "+f"(r[1]), "+f"(r[2]), "+f"(r[3]) : "r"(a0), "r"(0), "r"(a2), "r"(0), "r"(b0), "r"(b1));
    }
    __device__ __forceinline__ void store(float* part) {   // this warp's eight sums
        const int lane = threadIdx.x & 31;
        if constexpr (PRODUCT == MMA) {
            if (lane < 4) *reinterpret_cast<float2*>(part + 2 * lane) = make_float2(c[0] + d[0], c[1] + d[1]);
        } else {
            const float v = sum_lanes(c[0] + c[1], 4);
            if (lane % 4 == 0) part[lane / 4] = v;
        }
    }
};

// n groups of eight rows over 1024 columns; a warp meets the same two pieces of x in every group.
template <int PRODUCT>
__device__ __forceinline__ void multiply_groups(Cursor& at, int n, uint4 x0, uint4 x1, float (*part)[WARPS][8], bool dry) {
    const int warp = threadIdx.x / 32;
    for (int g = 0; g < n; ++g) {
        Sum<PRODUCT> sum;
        if (!dry) {
            const uint4* a = at.take();
            if constexpr (PRODUCT != NONE) sum.add(*a, x0);
            at.release();
            const uint4* b = at.take();
            if constexpr (PRODUCT != NONE) sum.add(*b, x1);
            at.release();
        }
        sum.store(part[g][warp]);
    }
}
template <int PRODUCT>
__device__ __forceinline__ void multiply_row(Sum<PRODUCT>& sum, Cursor& at, int units, const __half* x, bool dry) {
    if (dry) return;
    const uint4* mine = reinterpret_cast<const uint4*>(x) + (threadIdx.x / 32) * 4 + threadIdx.x % 4;
#pragma unroll 2
    for (int i = 0; i < units / WARPS; ++i) {
        const uint4* a = at.take();
        if constexpr (PRODUCT != NONE) sum.add(*a, mine[i * WARPS * 4]);
        at.release();
    }
}
// The sum of row threadIdx / 8, in each of its eight lanes; whole warps have rows or none.
__device__ __forceinline__ float sum_parts(float (*part)[WARPS][8], int rows) {
    const int row = threadIdx.x / 8, w = threadIdx.x % 8;
    return row >= rows ? 0 : sum_lanes(part[row / 8][w][row % 8] + part[row / 8][w + 8][row % 8], 8);
}
__device__ __forceinline__ void normalise(Shared& sm, float2 v, float2 gamma, float2 beta) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const float s = sum_lanes(v.x + v.y, 32), q = sum_lanes(v.x * v.x + v.y * v.y, 32);
    if (lane == 0) sm.sums[warp][0] = s, sm.sums[warp][1] = q;
    meet();
    const float mean = sum_lanes(sm.sums[lane % 16][0], 16) / HIDDEN;
    const float rstd = rsqrtf(sum_lanes(sm.sums[lane % 16][1], 16) / HIDDEN - mean * mean + 1e-5f);
    reinterpret_cast<__half2*>(sm.normed)[threadIdx.x] =
        __floats2half2_rn((v.x - mean) * rstd * gamma.x + beta.x, (v.y - mean) * rstd * gamma.y + beta.y);
    meet();
}

template <int SYNC, int PRODUCT>
__global__ void __launch_bounds__(THREADS + 32, 1) step(const Model m, const Setting s) {
    extern __shared__ __align__(128) uint8_t ring[];
    __shared__ Shared sm;
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, block = blockIdx.x;
    if (tid == 0) {
        for (int i = 0; i < s.slots; ++i) {
            mbarrier_init(&sm.full[i], 1);
            mbarrier_init(&sm.empty[i], min(WARPS, 1 << s.unit_shift));
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        for (unsigned& t : sm.segments) t = 0;
        sm.open = sm.broken = 0;
    }
    __syncthreads();
    if (warp == WARPS) {
        if (lane == 0 && !s.dry) copy_weights(m, s, ring, sm);
        return;
    }
    Cursor at{ring, sm, m.error, unsigned(warp), unsigned(s.unit_shift), unsigned(s.slots)};
    const int split_shift = s.splits == 8 ? 3 : 2, columns = DIM >> split_shift, head = block >> split_shift;
    const int column0 = (block & (s.splits - 1)) * columns;
    const int attention_groups = s.splits == 8 ? 4 : block < 64 ? 8 : 0, attention_rows = attention_groups * 8;
    const int up_first = s.splits == 8 ? block * 32 : (block - 64) * 64, helpers = s.splits == 8 ? 128 : 64;
    unsigned barriers = s.epoch * LAYERS * 3, last = clock();
    auto mark = [&](Segment segment) {
        if (tid == 0) {
            const unsigned now = clock();
            sm.segments[segment] += now - last;
            last = now;
        }
    };
    enum { C_BARRIER = 0, C_HIDDEN = 32, C_UP = 64, C_ATTENTION = 96, C_QK = 128 };   // words; a line each
    auto wait_count = [&](int counter, unsigned target, unsigned code) {
        if (tid == 0)
            await([&] {
                const bool there = int(read_count(m.counters + counter) - target) >= 0;
                if (!there && s.nap) __nanosleep(s.nap);
                return there;
            }, POLL_LIMIT, sm, m.error, code);
        meet();
    };
    auto grid_barrier = [&] {
        if (SYNC != BARRIER) return;
        meet();
        if (tid == 0) count_up(m.counters + C_BARRIER);
        wait_count(C_BARRIER, ++barriers * BLOCKS, 5);
    };
    // Slots are used again a layer later: a block can only get there with values that every reader of the last ones sent
    // after its block had met behind the reading, so one set of slots is enough.
    auto fetch = [&](auto& values, const uint2* slots, uint32_t tag, unsigned code) {    // pairs of slots, all at once
        constexpr int PAIRS = sizeof(values) / sizeof(uint2);
        uint64_t v[PAIRS][2];
        auto read = [&] {
#pragma unroll
            for (int i = 0; i < PAIRS; ++i) read_slots(slots + i * 2 * THREADS, v[i][0], v[i][1]);
        };
        read();
        if (SYNC == TAGGED)
            await([&] {
                bool there = true;
#pragma unroll
                for (int i = 0; i < PAIRS; ++i) there &= uint32_t(v[i][0] >> 32) == tag && uint32_t(v[i][1] >> 32) == tag;
                if (there) return true;
                if (s.nap) __nanosleep(s.nap);
                read();
                return false;
            }, POLL_LIMIT, sm, m.error, code);
#pragma unroll
        for (int i = 0; i < PAIRS; ++i) values[i] = make_uint2(uint32_t(v[i][0]), uint32_t(v[i][1]));
    };
    float own = 0;                                    // the residual of row tid / 4, kept by the first warp
    if (warp == 0) own = __half2float(m.input[block * 8 + lane / 4]);

    for (int layer = 0; layer <= LAYERS; ++layer) {
        const unsigned tag = s.epoch * 32 + layer + 1, times = s.epoch * LAYERS + layer + 1;
        // What does not depend on other blocks is asked for before waiting for them.
        const float2 gamma = reinterpret_cast<const float2*>(m.norm + size_t(layer) * 2 * HIDDEN)[tid];
        const float2 beta = reinterpret_cast<const float2*>(m.norm + (size_t(layer) * 2 + 1) * HIDDEN)[tid];
        float first_bias = 0, up_bias = 0, second_bias = 0, state[2] = {};
        uint4 features = {};
        float* state_at = m.state + ((size_t(layer) * HEADS + head) * DIM + tid / 8) * DIM + column0 + tid % 8;
        if (layer < LAYERS) {
            first_bias = m.bias[layer * 9216 + block * 64 + tid / 8];
            up_bias = m.bias[layer * 9216 + block * 64 + min(attention_rows + tid / 8, 63)];
            if (warp == 0) second_bias = m.bias[layer * 9216 + 8192 + block * 8 + lane / 4];
            if (attention_groups) {
                features = reinterpret_cast<const uint4*>(m.features + (size_t(layer) * HEADS + head) * DIM * DIM)[tid];
                for (int j = 0; j < 2; ++j)
                    if (j * 8 < columns) state[j] = state_at[j * 8];
            }
        }
        float2 v;
        if (layer == 0) {
            v = __half22float2(reinterpret_cast<const __half2*>(m.input)[tid]);
        } else {
            if (SYNC == COUNTERS) wait_count(C_HIDDEN, (times - 1) * BLOCKS, 6);
            grid_barrier();
            uint2 h[1];
            fetch(h, m.hidden + 2 * tid, tag - 1, 6);
            v = make_float2(__uint_as_float(h[0].x), __uint_as_float(h[0].y));
        }
        mark(HIDDEN_WAIT);
        if (tid == 0) sm.open = 2 * layer;
        normalise(sm, v, gamma, beta);
        mark(NORM);
        const uint4* normed = reinterpret_cast<const uint4*>(sm.normed) + warp * 4 + lane % 4;
        const uint4 x0 = normed[0], x1 = normed[WARPS * 4];
        if (layer == LAYERS) {                        // the head
            const int groups = head_groups(block);
            const size_t row0 = size_t(block) * (HEAD_GROUPS / BLOCKS) + min(block, HEAD_GROUPS % BLOCKS);
            for (int g = 0; g < groups; g += 8) {
                multiply_groups<PRODUCT>(at, min(8, groups - g), x0, x1, sm.part, s.dry);
                meet();
                const float logit = sum_parts(sm.part, 8 * min(8, groups - g));
                if (tid % 8 == 0 && g + tid / 64 < groups) m.logits[(row0 + g) * 8 + tid / 8] = logit;
                meet();
            }
            mark(HEAD);
            break;
        }

        if (attention_groups) {                       // this block's q, k, v and gate
            multiply_groups<PRODUCT>(at, attention_groups, x0, x1, sm.part, s.dry);
            meet();
            const float y = sum_parts(sm.part, attention_rows) + first_bias;
            const int row = tid / 8, kind = row >> (6 - split_shift), place = row & (columns - 1);
            if (tid % 8 == 0 && row < attention_rows) {
                if (kind < 2) publish(m.qk + kind * HIDDEN + head * DIM + column0 + place, __float_as_uint(y), tag);
                else if (kind == 2) sm.value[place] = y;
                else sm.gate[place] = y;
            }
            if (SYNC == COUNTERS) {
                meet();
                if (tid == 0) count_up(m.counters + C_QK + head * 32);
            }
        }
        if (attention_groups < 8) {                   // its rows of the MLP's first product
            multiply_groups<PRODUCT>(at, 8 - attention_groups, x0, x1, sm.part + attention_groups, s.dry);
            meet();
            const int row = tid / 8;
            const float a = gelu(sum_parts(sm.part + attention_groups, 64 - attention_rows) + up_bias);
            const float b = __shfl_down_sync(~0u, a, 8);
            if (tid % 16 == 0 && row < 64 - attention_rows) publish(m.up + (up_first + row) / 2, bits_of(__floats2half2_rn(a, b)), tag);
            if (SYNC == COUNTERS) {
                meet();
                if (tid == 0) count_up(m.counters + C_UP);
            }
        }
        mark(FIRST);
        grid_barrier();

        if (attention_groups) {
            if (SYNC == COUNTERS) wait_count(C_QK + head * 32, times * s.splits, 7);
            if (tid < DIM) {
                uint2 two[1];
                fetch(two, m.qk + tid / 32 * HIDDEN + head * DIM + tid % 32 * 2, tag, 7);
                *reinterpret_cast<uint2*>(&sm.qk[tid / 32][tid % 32 * 2]) = two[0];
            }
            meet();
            mark(QK_WAIT);
            float z[2] = {};
            const uint32_t p[4] = {features.x, features.y, features.z, features.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float2 f = __half22float2(halves_of(p[i]));
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const float2 u = *reinterpret_cast<const float2*>(&sm.qk[j][tid % 8 * 8 + i * 2]);
                    z[j] = fmaf(f.x, u.x, fmaf(f.y, u.y, z[j]));
                }
            }
            for (int j = 0; j < 2; ++j) {
                z[j] = sum_lanes(z[j], 8);
                if (tid % 8 == 0) sm.score[j][tid / 8] = z[j];
            }
            meet();
            for (int j = 0; j < 2; ++j) {             // softmax over the head's 64 features
                const float a = sm.score[j][lane], b = sm.score[j][lane + 32], top = max_lanes(fmaxf(a, b));
                z[j] = __expf(z[j] - top) / sum_lanes(__expf(a - top) + __expf(b - top), 32);
            }
            for (int j = 0; j < 2; ++j)
                if (j * 8 < columns) {
                    state[j] = fmaf(decay_of(head), state[j], z[1] * sm.value[tid % 8 + j * 8]);
                    state_at[j * 8] = state[j];
                    float o = z[0] * state[j];
                    o += __shfl_xor_sync(~0u, o, 8);
                    o += __shfl_xor_sync(~0u, o, 16);
                    if (lane < 8) sm.readout[warp][lane + j * 8] = o;
                }
            meet();
            if (tid < columns) {                      // consumers normalise: they hold the whole head
                float o = 0;
                for (int w = 0; w < WARPS; ++w) o += sm.readout[w][tid];
                publish(m.attention + head * DIM + column0 + tid, bits_of(__floats2half2_rn(o, silu(sm.gate[tid]))), tag);
            }
            if (SYNC == COUNTERS && warp == 0) {
                __syncwarp();
                if (lane == 0) count_up(m.counters + C_ATTENTION);
            }
            mark(ATTENTION);
        }
        auto take_attention = [&] {
            grid_barrier();
            if (SYNC == COUNTERS) wait_count(C_ATTENTION, times * helpers, 8);
            uint2 two[1];
            fetch(two, m.attention + 2 * tid, tag, 8);        // a warp's 64 values are one head's
            const float2 a = __half22float2(halves_of(two[0].x)), b = __half22float2(halves_of(two[0].y));
            const float mean = sum_lanes(a.x + b.x, 32) / DIM;
            const float da = a.x - mean, db = b.x - mean, rstd = rsqrtf(sum_lanes(da * da + db * db, 32) / DIM + 1e-5f);
            reinterpret_cast<__half2*>(sm.attended)[tid] = __floats2half2_rn(da * rstd * a.y, db * rstd * b.y);
            meet();
            mark(ATTENTION_WAIT);
        };
        if (!s.overlap) take_attention();
        if (SYNC == COUNTERS) wait_count(C_UP, times * helpers, 9);
        uint2 four[2];
        fetch(four, m.up + 2 * tid, tag, 9);
        for (int i = 0; i < 2; ++i) reinterpret_cast<uint2*>(sm.up)[tid + i * THREADS] = four[i];
        if (tid == 0) sm.open = 2 * layer + 1;
        meet();
        mark(UP_WAIT);
        Sum<PRODUCT> sum;
        multiply_row<PRODUCT>(sum, at, INNER / 32, sm.up, s.dry);
        mark(DOWN);
        if (s.overlap) take_attention();
        multiply_row<PRODUCT>(sum, at, HIDDEN / 32, sm.attended, s.dry);
        sum.store(sm.part[8][warp]);
        meet();
        if (warp == 0) {
            float y = 0;
            for (int i = 0; i < 4; ++i) y += sm.part[8][lane % 4 * 4 + i][lane / 4];
            own += sum_lanes(y, 4) + second_bias;
            if (lane % 4 == 0) publish(m.hidden + block * 8 + lane / 4, __float_as_uint(own), tag);
            __syncwarp();
            if (SYNC == COUNTERS && lane == 0) count_up(m.counters + C_HIDDEN);
        }
        mark(DENSE);
    }
    meet();
    if (tid < SEGMENTS) m.segments[block * SEGMENTS + tid] = sm.segments[tid];
}

// --- ceilings -----------------------------------------------------------------------------------------------------
__global__ void stream_only(const uint8_t* weights, size_t bytes, unsigned chunk, unsigned slots) {
    extern __shared__ __align__(128) uint8_t ring[];
    __shared__ uint64_t full[MAX_SLOTS];
    if (threadIdx.x) return;
    for (unsigned i = 0; i < slots; ++i) mbarrier_init(&full[i], 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    const size_t all = bytes / chunk, mine = (all - blockIdx.x + gridDim.x - 1) / gridDim.x;
    for (size_t c = 0; c < mine + slots; ++c) {
        const unsigned slot = c % slots, parity = (c / slots - 1) & 1;
        if (c >= slots && c - slots < mine)
            for (const long long start = clock64(); !mbarrier_done(&full[slot], parity);)
                if (clock64() - start > COPY_LIMIT) __trap();
        if (c >= mine) continue;
        mbarrier_expect(&full[slot], chunk);
        bulk_copy(ring + size_t(slot) * chunk, weights + (c * gridDim.x + blockIdx.x) * chunk, chunk, &full[slot], false);
    }
}
__global__ void read_only(const uint4* p, size_t n, unsigned* sink) {
    unsigned x = 0;
    const size_t stride = size_t(gridDim.x) * blockDim.x;
#pragma unroll 8
    for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += stride) {
        const uint4 v = __ldcs(p + i);
        x ^= v.x ^ v.y ^ v.z ^ v.w;
    }
    if (x == 0x12345678u) *sink = x;
}

// --- reference: one simple kernel a stage, same roundings to float16 -------------------------------------------------
struct Scratch { float *hidden, *first, *normed, *up, *attended; };   // 1024, 8192 (by block and row), 1024, 4096, 1024
__device__ float row_times(const Model& m, const Setting& s, int block, unsigned unit, int g, int columns, const float* x) {
    float sum = 0;
    for (int k = threadIdx.x % 32; k < columns; k += 32) {
        unsigned room;
        const __half* w = reinterpret_cast<const __half*>(m.weights + stream_unit(s, block, unit + k / 32, &room) * 32);
        sum += __half2float(w[g * 32 + k % 32]) * x[k];
    }
    return sum_lanes(sum, 32);
}
__global__ void reference_norm(Model m, Scratch r, int layer) {       // one warp
    float sum = 0, square = 0;
    for (int k = threadIdx.x; k < HIDDEN; k += 32) sum += r.hidden[k];
    const float mean = sum_lanes(sum, 32) / HIDDEN;
    for (int k = threadIdx.x; k < HIDDEN; k += 32) square += (r.hidden[k] - mean) * (r.hidden[k] - mean);
    const float rstd = rsqrtf(sum_lanes(square, 32) / HIDDEN + 1e-5f);
    const float* norm = m.norm + size_t(layer) * 2 * HIDDEN;
    for (int k = threadIdx.x; k < HIDDEN; k += 32)
        r.normed[k] = __half2float(__float2half((r.hidden[k] - mean) * rstd * norm[k] + norm[HIDDEN + k]));
}
__global__ void reference_first(Model m, Setting s, Scratch r, int layer) {       // a warp a row
    const int row = (blockIdx.x * blockDim.x + threadIdx.x) / 32, block = row / 64, within = row % 64;
    const float y = row_times(m, s, block, layer * LAYER_UNITS + within / 8 * 32, within % 8, HIDDEN, r.normed) + m.bias[layer * 9216 + row];
    r.first[row] = y;
    const int skipped = s.splits == 8 ? 32 : 0;
    if (s.splits == 8 ? within >= 32 : block >= 64)
        r.up[s.splits == 8 ? block * 32 + within - skipped : row - 4096] = __half2float(__float2half(gelu(y)));
}
__global__ void reference_attention(Model m, Setting s, Scratch r, int layer) {   // a block of 64 threads a head
    __shared__ float z[2][DIM], o[DIM];
    const int head = blockIdx.x, i = threadIdx.x, columns = DIM / s.splits;
    auto value = [&](int kind, int n) { return r.first[(head * s.splits + n / columns) * 64 + kind * columns + n % columns]; };
    const __half* p = m.features + (size_t(layer) * HEADS + head) * DIM * DIM + i * DIM;
    for (int j = 0; j < 2; ++j) {
        float sum = 0;
        for (int k = 0; k < DIM; ++k) sum += __half2float(p[k]) * value(j, k);
        z[j][i] = sum;
    }
    __syncthreads();
    float top[2] = {-1e30f, -1e30f}, total[2] = {0, 0}, out = 0;
    for (int j = 0; j < 2; ++j) {
        for (int k = 0; k < DIM; ++k) top[j] = fmaxf(top[j], z[j][k]);
        for (int k = 0; k < DIM; ++k) total[j] += expf(z[j][k] - top[j]);
    }
    for (int f = 0; f < DIM; ++f) {
        float& state = m.state[((size_t(layer) * HEADS + head) * DIM + f) * DIM + i];
        state = decay_of(head) * state + expf(z[1][f] - top[1]) / total[1] * value(2, i);
        out += expf(z[0][f] - top[0]) / total[0] * state;
    }
    o[i] = __half2float(__float2half(out));
    __syncthreads();
    float mean = 0, square = 0;
    for (int k = 0; k < DIM; ++k) mean += o[k] / DIM;
    for (int k = 0; k < DIM; ++k) square += (o[k] - mean) * (o[k] - mean);
    const float gate = __half2float(__float2half(silu(value(3, i))));
    r.attended[head * DIM + i] = __half2float(__float2half((o[i] - mean) * rsqrtf(square / DIM + 1e-5f) * gate));
}
__global__ void reference_second(Model m, Setting s, Scratch r, int layer) {
    const int row = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
    const unsigned unit = layer * LAYER_UNITS + FIRST_UNITS;
    const float y = row_times(m, s, row / 8, unit, row % 8, INNER, r.up) + row_times(m, s, row / 8, unit + 128, row % 8, HIDDEN, r.attended);
    if (threadIdx.x % 32 == 0) r.hidden[row] += y + m.bias[layer * 9216 + 8192 + row];
}
__global__ void reference_head(Model m, Setting s, Scratch r) {       // a block of 8 warps a group of rows; block 0's stream
    const int group = blockIdx.x;                                     // goes through all groups in order
    const float y = row_times(m, s, 0, LAYERS * LAYER_UNITS + group * 32, threadIdx.x / 32, HIDDEN, r.normed);
    if (threadIdx.x % 32 == 0) m.logits[group * 8 + threadIdx.x / 32] = y;
}
__global__ void widen(const __half* from, float* to) { to[threadIdx.x] = __half2float(from[threadIdx.x]); }
template <class T>
__global__ void randomise(T* p, size_t n, float middle, float scale, uint32_t seed) {
    for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += size_t(gridDim.x) * blockDim.x) {
        uint64_t x = (i + 1) * 0x9E3779B97F4A7C15ull + seed * 0xD1B54A32D192ED03ull;
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9ull;
        x = (x ^ x >> 27) * 0x94D049BB133111EBull;
        p[i] = T(middle + scale * (float(x >> 40) / 8388608.f - 1.f));
    }
}

// --- host ---------------------------------------------------------------------------------------------------------
FILE* json = nullptr;
bool first_record = true;
void finish(int code) {
    if (json) fprintf(json, "\n ]}\n"), fclose(json);
    exit(code);
}
std::string doing = "setting up";
void check(cudaError_t e, int line) {
    if (e == cudaSuccess) return;
    printf("STOPPED at '%s' (line %d): %s\n", doing.c_str(), line, cudaGetErrorString(e));
    finish(3);
}
#define CHECK(x) check((x), __LINE__)
template <class T>
T* device(size_t n) {
    T* p;
    CHECK(cudaMalloc(&p, n * sizeof(T)));
    CHECK(cudaMemset(p, 0, n * sizeof(T)));
    return p;
}
struct Times { float median, low, high; };
template <class F>
Times time_of(F launch, int n, cudaStream_t stream) {                 // µs; a tenth to warm up
    cudaEvent_t a, b;
    CHECK(cudaEventCreate(&a));
    CHECK(cudaEventCreate(&b));
    std::vector<float> t;
    for (int i = -n / 10; i < n; ++i) {
        CHECK(cudaEventRecord(a, stream));
        launch();
        CHECK(cudaEventRecord(b, stream));
        CHECK(cudaEventSynchronize(b));
        float ms;
        CHECK(cudaEventElapsedTime(&ms, a, b));
        if (i >= 0) t.push_back(ms * 1000);
    }
    std::sort(t.begin(), t.end());
    return {t[n / 2], t[n / 10], t[n * 9 / 10]};
}

struct Variant { const char* name; int sync, product, splits, chunk_kb, ring_kb, flight_kb, ahead, overlap, interleaved, evict, nap, dry, cooperative; };
const Variant VARIANTS[] = {
    // name                        sync      product split chunk ring flight ahead overlap interleaved evict nap dry cooperative
    {"copies only, in step order", NO_WAIT,  NONE, 8, 16, 192, 0, 1, 1, 1, 0, 0, 0, 1},
    {"products, nobody waits, fma", NO_WAIT, FMA, 8, 16, 192, 0, 1, 1, 1, 0, 0, 0, 1},
    {"products, nobody waits, mma", NO_WAIT, MMA, 8, 16, 192, 0, 1, 1, 1, 0, 0, 0, 1},
    {"chain alone, barriers",      BARRIER,  MMA, 8, 16, 192, 0, 1, 1, 1, 0, 0, 1, 1},
    {"chain alone, counters",      COUNTERS, MMA, 8, 16, 192, 0, 1, 1, 1, 0, 0, 1, 1},
    {"chain alone, tagged",        TAGGED,   MMA, 8, 16, 192, 0, 1, 1, 1, 0, 0, 1, 1},
    {"chain alone, tagged, 4",     TAGGED,   MMA, 4, 16, 192, 0, 1, 1, 1, 0, 0, 1, 1},
    {"barriers, fma",              BARRIER,  FMA, 8, 16, 192, 0, 1, 1, 1, 0, 0, 0, 1},
    {"counters, fma",              COUNTERS, FMA, 8, 16, 192, 0, 1, 1, 1, 0, 0, 0, 1},
    {"tagged, fma",                TAGGED,   FMA, 8, 16, 192, 0, 1, 1, 1, 0, 0, 0, 1},
    {"barriers",                   BARRIER,  MMA, 8, 16, 192, 0, 1, 1, 1, 0, 0, 0, 1},
    {"barriers, attention exposed", BARRIER, MMA, 8, 16, 192, 0, 1, 0, 1, 0, 0, 0, 1},
    {"barriers, not ahead",        BARRIER,  MMA, 8, 16, 192, 0, 0, 1, 1, 0, 0, 0, 1},
    {"barriers, flight 64",        BARRIER,  MMA, 8, 16, 192, 64, 1, 1, 1, 0, 0, 0, 1},
    {"counters",                   COUNTERS, MMA, 8, 16, 192, 0, 1, 1, 1, 0, 0, 0, 1},
    {"counters, 4 blocks a head",  COUNTERS, MMA, 4, 16, 192, 0, 1, 1, 1, 0, 0, 0, 1},
    {"counters, attention exposed", COUNTERS, MMA, 8, 16, 192, 0, 1, 0, 1, 0, 0, 0, 1},
    {"counters, not ahead",        COUNTERS, MMA, 8, 16, 192, 0, 0, 1, 1, 0, 0, 0, 1},
    {"counters, flight 64",        COUNTERS, MMA, 8, 16, 192, 64, 1, 1, 1, 0, 0, 0, 1},
    {"counters, pause 50 ns",      COUNTERS, MMA, 8, 16, 192, 0, 1, 1, 1, 0, 50, 0, 1},
    {"tagged",                     TAGGED,   MMA, 8, 16, 192, 0, 1, 1, 1, 0, 0, 0, 1},
    {"tagged again",               TAGGED,   MMA, 8, 16, 192, 0, 1, 1, 1, 0, 0, 0, 1},
    {"tagged, ordinary launch",    TAGGED,   MMA, 8, 16, 192, 0, 1, 1, 1, 0, 0, 0, 0},
    {"tagged, 4 blocks a head",    TAGGED,   MMA, 4, 16, 192, 0, 1, 1, 1, 0, 0, 0, 1},
    {"tagged, attention exposed",  TAGGED,   MMA, 8, 16, 192, 0, 1, 0, 1, 0, 0, 0, 1},
    {"tagged, not ahead",          TAGGED,   MMA, 8, 16, 192, 0, 0, 1, 1, 0, 0, 0, 1},
    {"tagged, ring 96",            TAGGED,   MMA, 8, 16, 96, 0, 1, 1, 1, 0, 0, 0, 1},
    {"tagged, ring 48",            TAGGED,   MMA, 8, 16, 48, 0, 1, 1, 1, 0, 0, 0, 1},
    {"tagged, flight 128",         TAGGED,   MMA, 8, 16, 192, 128, 1, 1, 1, 0, 0, 0, 1},
    {"tagged, flight 64",          TAGGED,   MMA, 8, 16, 192, 64, 1, 1, 1, 0, 0, 0, 1},
    {"tagged, flight 32",          TAGGED,   MMA, 8, 16, 192, 32, 1, 1, 1, 0, 0, 0, 1},
    {"tagged, chunk 4",            TAGGED,   MMA, 8, 4, 192, 0, 1, 1, 1, 0, 0, 0, 1},
    {"tagged, chunk 8",            TAGGED,   MMA, 8, 8, 192, 0, 1, 1, 1, 0, 0, 0, 1},
    {"tagged, chunk 32",           TAGGED,   MMA, 8, 32, 192, 0, 1, 1, 1, 0, 0, 0, 1},
    {"tagged, chunk 8 flight 64",  TAGGED,   MMA, 8, 8, 192, 64, 1, 1, 1, 0, 0, 0, 1},
    {"tagged, pause 50 ns",        TAGGED,   MMA, 8, 16, 192, 0, 1, 1, 1, 0, 50, 0, 1},
    {"tagged, weights leave L2 first", TAGGED, MMA, 8, 16, 192, 0, 1, 1, 1, 1, 0, 0, 1},
    {"tagged, flight 64, leave first", TAGGED, MMA, 8, 16, 192, 64, 1, 1, 1, 1, 0, 0, 1},
    {"nobody waits, flight 32",    NO_WAIT,  MMA, 8, 16, 192, 32, 1, 1, 1, 0, 0, 0, 1},
    {"copies only, flight 32",     NO_WAIT,  NONE, 8, 16, 192, 32, 1, 1, 1, 0, 0, 0, 1},
    {"copies only, flight 32, leave first", NO_WAIT, NONE, 8, 16, 192, 32, 1, 1, 1, 1, 0, 0, 1},
    {"barriers, flight 32",        BARRIER,  MMA, 8, 16, 192, 32, 1, 1, 1, 0, 0, 0, 1},
    {"counters, flight 32",        COUNTERS, MMA, 8, 16, 192, 32, 1, 1, 1, 0, 0, 0, 1},
    {"counters, 4 blocks, flight 32", COUNTERS, MMA, 4, 16, 192, 32, 1, 1, 1, 0, 0, 0, 1},
    {"tagged, fma, flight 32",     TAGGED,   FMA, 8, 16, 192, 32, 1, 1, 1, 0, 0, 0, 1},
    {"tagged, flight 48",          TAGGED,   MMA, 8, 16, 192, 48, 1, 1, 1, 0, 0, 0, 1},
    {"tagged, flight 32, again",   TAGGED,   MMA, 8, 16, 192, 32, 1, 1, 1, 0, 0, 0, 1},
    {"tagged, flight 16",          TAGGED,   MMA, 8, 16, 192, 16, 1, 1, 1, 0, 0, 0, 1},
    {"tagged, flight 32, leave first", TAGGED, MMA, 8, 16, 192, 32, 1, 1, 1, 1, 0, 0, 1},
    {"tagged, chunk 8 flight 48",  TAGGED,   MMA, 8, 8, 192, 48, 1, 1, 1, 0, 0, 0, 1},
    {"tagged, chunk 8 flight 32",  TAGGED,   MMA, 8, 8, 192, 32, 1, 1, 1, 0, 0, 0, 1},
    {"tagged, chunk 8 flight 24",  TAGGED,   MMA, 8, 8, 192, 24, 1, 1, 1, 0, 0, 0, 1},
    {"tagged, chunk 32 flight 32", TAGGED,   MMA, 8, 32, 192, 32, 1, 1, 1, 0, 0, 0, 1},
    {"tagged, ring 128 flight 32", TAGGED,   MMA, 8, 16, 128, 32, 1, 1, 1, 0, 0, 0, 1},
    {"tagged, ring 96 flight 32",  TAGGED,   MMA, 8, 16, 96, 32, 1, 1, 1, 0, 0, 0, 1},
    {"tagged, ring 64 flight 32",  TAGGED,   MMA, 8, 16, 64, 32, 1, 1, 1, 0, 0, 0, 1},
    {"tagged, 4 blocks, flight 32", TAGGED,  MMA, 4, 16, 192, 32, 1, 1, 1, 0, 0, 0, 1},
    {"tagged, pause, flight 32",   TAGGED,   MMA, 8, 16, 192, 32, 1, 1, 1, 0, 50, 0, 1},
    {"tagged, a stream a block",   TAGGED,   MMA, 8, 16, 192, 0, 1, 1, 0, 0, 0, 0, 1},
};
template <int SYNC>
const void* kernel_of(int product) {
    return product == NONE ? (const void*)step<SYNC, NONE> : product == FMA ? (const void*)step<SYNC, FMA> : (const void*)step<SYNC, MMA>;
}
const void* kernel_of(const Variant& v) {
    return v.sync == NO_WAIT ? kernel_of<NO_WAIT>(v.product) : v.sync == BARRIER ? kernel_of<BARRIER>(v.product)
         : v.sync == COUNTERS ? kernel_of<COUNTERS>(v.product) : kernel_of<TAGGED>(v.product);
}

constexpr size_t STATE = size_t(LAYERS) * HEADS * DIM * DIM;
struct Result { std::vector<float> logits, state; };
struct Bench {
    Model m;
    Scratch scratch;
    float* initial_state;
    cudaStream_t stream;

    void prepare() {
        CHECK(cudaMemcpyAsync(m.state, initial_state, STATE * 4, cudaMemcpyDeviceToDevice, stream));
        CHECK(cudaMemsetAsync(m.logits, 0xff, VOCABULARY * 4, stream));
        CHECK(cudaMemsetAsync(m.hidden, 0xff, 6144 * sizeof(uint2), stream));   // all slots: NaN, and no tag that is used
        CHECK(cudaMemsetAsync(m.counters, 0, 4096, stream));
        CHECK(cudaMemsetAsync(m.error, 0, 4, stream));
    }
    Result result() {
        Result r{std::vector<float>(VOCABULARY), std::vector<float>(STATE)};
        CHECK(cudaMemcpyAsync(r.logits.data(), m.logits, VOCABULARY * 4, cudaMemcpyDeviceToHost, stream));
        CHECK(cudaMemcpyAsync(r.state.data(), m.state, STATE * 4, cudaMemcpyDeviceToHost, stream));
        CHECK(cudaStreamSynchronize(stream));
        return r;
    }
    Result reference(const Setting& s) {
        prepare();
        widen<<<1, HIDDEN, 0, stream>>>(m.input, scratch.hidden);
        for (int layer = 0; layer < LAYERS; ++layer) {
            reference_norm<<<1, 32, 0, stream>>>(m, scratch, layer);
            reference_first<<<1024, 256, 0, stream>>>(m, s, scratch, layer);
            reference_attention<<<HEADS, DIM, 0, stream>>>(m, s, scratch, layer);
            reference_second<<<128, 256, 0, stream>>>(m, s, scratch, layer);
        }
        reference_norm<<<1, 32, 0, stream>>>(m, scratch, LAYERS);
        reference_head<<<HEAD_GROUPS, 256, 0, stream>>>(m, s, scratch);
        CHECK(cudaGetLastError());
        return result();
    }
};
double distance(const std::vector<float>& a, const std::vector<float>& b) {   // relative, in the 2-norm; NaN stays NaN
    double d = 0, n = 0;
    for (size_t i = 0; i < a.size(); ++i) d += double(a[i] - b[i]) * (a[i] - b[i]), n += double(b[i]) * b[i];
    return std::sqrt(d / n);
}
uint64_t digest(const Result& r) {
    uint64_t h = 1469598103934665603ull;
    for (const auto* v : {&r.logits, &r.state})
        for (float f : *v) {
            uint32_t u;
            memcpy(&u, &f, 4);
            h = (h ^ u) * 1099511628211ull;
        }
    return h;
}
void ceiling(const char* name, double bytes, Times t) {
    printf("%-32s %8.1f us (%.1f to %.1f) %6.2f TB/s\n", name, t.median, t.low, t.high, bytes / t.median / 1e6);
    fprintf(json, "%s\n  {\"name\": \"%s\", \"us\": %.2f, \"low\": %.2f, \"high\": %.2f, \"tb_s\": %.3f}", first_record ? "" : ",", name,
            t.median, t.low, t.high, bytes / t.median / 1e6);
    first_record = false;
    fflush(stdout);
}

int main(int argc, char** argv) {
    const char* path = argc > 1 ? argv[1] : "step-experiment.json";
    const int launches = argc > 2 ? std::max(20, atoi(argv[2])) : 200;
    cudaDeviceProp device_is;
    CHECK(cudaGetDeviceProperties(&device_is, 0));
    if (device_is.major != 9 || device_is.multiProcessorCount < BLOCKS) {
        printf("%s: this needs compute capability 9.0 and %d multiprocessors\n", device_is.name, BLOCKS);
        return 2;
    }
    if (!(json = fopen(path, "w"))) return printf("cannot write %s\n", path), 2;
    printf("%s, %d multiprocessors; %.1f MB of weights; median of %d launches (tenths)\n", device_is.name,
           device_is.multiProcessorCount, WEIGHT_BYTES / 1e6, launches);
    fprintf(json, "{\"device\": \"%s\", \"multiprocessors\": %d, \"weight_bytes\": %.0f, \"launches\": %d, \"variants\": [", device_is.name,
            device_is.multiProcessorCount, WEIGHT_BYTES, launches);

    Bench b;
    CHECK(cudaStreamCreateWithFlags(&b.stream, cudaStreamNonBlocking));
    Model& m = b.m;
    m.weights = device<uint4>(WEIGHT_UNITS * 32);
    m.features = device<__half>(STATE);
    m.input = device<__half>(HIDDEN);
    m.bias = device<float>(LAYERS * 9216);
    m.norm = device<float>((LAYERS + 1) * 2 * HIDDEN);
    m.state = device<float>(STATE);
    b.initial_state = device<float>(STATE);
    m.logits = device<float>(VOCABULARY);
    m.hidden = device<uint2>(6144);
    m.up = m.hidden + 1024, m.qk = m.up + 2048, m.attention = m.qk + 2048;
    m.counters = device<unsigned>(1024);
    m.error = device<unsigned>(1);
    m.segments = device<unsigned>(BLOCKS * SEGMENTS);
    b.scratch = {device<float>(HIDDEN), device<float>(8192), device<float>(HIDDEN), device<float>(INNER), device<float>(HIDDEN)};
    randomise<<<1024, 256>>>(reinterpret_cast<__half*>(m.weights), WEIGHT_UNITS * 256, 0.f, 0.054f, 1);
    randomise<<<256, 256>>>(m.features, STATE, 0.f, 0.2f, 2);
    randomise<<<4, 256>>>(m.input, HIDDEN, 0.f, 1.f, 3);
    randomise<<<256, 256>>>(m.bias, LAYERS * 9216, 0.f, 0.1f, 4);
    randomise<<<64, 256>>>(m.norm, (LAYERS + 1) * 2 * HIDDEN, 0.5f, 0.5f, 5);
    randomise<<<256, 256>>>(b.initial_state, STATE, 0.f, 0.5f, 6);
    CHECK(cudaGetLastError());
    CHECK(cudaDeviceSynchronize());

    doing = "ceilings";
    {
        uint8_t* other = device<uint8_t>(size_t(WEIGHT_BYTES));
        ceiling("plain copy (read and written)", 2 * WEIGHT_BYTES, time_of([&] {
            CHECK(cudaMemcpyAsync(other, m.weights, size_t(WEIGHT_BYTES), cudaMemcpyDeviceToDevice, b.stream)); }, 50, b.stream));
        CHECK(cudaFree(other));
    }
    ceiling("plain read", WEIGHT_BYTES, time_of([&] { read_only<<<device_is.multiProcessorCount * 8, 256, 0, b.stream>>>(
        m.weights, WEIGHT_UNITS * 32, m.error); }, launches, b.stream));
    CHECK(cudaFuncSetAttribute(stream_only, cudaFuncAttributeMaxDynamicSharedMemorySize, RING_BYTES));
    for (int blocks : {BLOCKS, device_is.multiProcessorCount})
        for (int kb : {4, 8, 16, 32})
            for (int depth : {192, 64, 32}) {
                if (depth != 192 && kb != 16) continue;
                char name[64];
                snprintf(name, sizeof name, "stream, %d blocks, %d of %d KB", blocks, depth / kb, kb);
                ceiling(name, WEIGHT_BYTES, time_of([&] { stream_only<<<blocks, 32, RING_BYTES, b.stream>>>(
                    (const uint8_t*)m.weights, size_t(WEIGHT_BYTES), kb * 1024, depth / kb); CHECK(cudaGetLastError()); }, launches, b.stream));
            }

    std::map<int, Result> references;
    std::map<int, uint64_t> digests;
    int failures = 0;
    printf("\n%-32s %8s %15s %8s %6s  %-19s %-9s | us of the time in, mean of blocks:", "variant", "us", "tenths", "in a row", "TB/s", "error logits state", "same bits");
    for (const char* n : SEGMENT_NAMES) printf(" %s", n);
    printf("\n");
    for (const Variant& v : VARIANTS) {
        doing = v.name;
        Setting s{};
        s.splits = v.splits, s.slots = v.ring_kb / v.chunk_kb, s.flight = v.flight_kb / v.chunk_kb, s.ahead = v.ahead, s.overlap = v.overlap;
        s.interleaved = v.interleaved, s.evict_first = v.evict, s.nap = v.nap, s.dry = v.dry;
        for (s.unit_shift = 0; (UNIT_BYTES << s.unit_shift) < v.chunk_kb * 1024;) ++s.unit_shift;
        const void* kernel = kernel_of(v);
        const int ring = v.ring_kb * 1024;
        int resident = 0;
        CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, ring));
        CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, THREADS + 32, ring));
        if (resident * device_is.multiProcessorCount < BLOCKS || s.slots > MAX_SLOTS) {
            printf("%-32s FAILED: its blocks cannot all be resident\n", v.name), ++failures;
            continue;
        }
        auto launch = [&] {
            void* arguments[] = {&m, &s};
            CHECK(v.cooperative ? cudaLaunchCooperativeKernel(kernel, BLOCKS, THREADS + 32, arguments, ring, b.stream)
                                : cudaLaunchKernel(kernel, BLOCKS, THREADS + 32, arguments, ring, b.stream));
            ++s.epoch;
        };
        auto error = [&] {
            unsigned e;
            CHECK(cudaMemcpyAsync(&e, m.error, 4, cudaMemcpyDeviceToHost, b.stream));
            CHECK(cudaStreamSynchronize(b.stream));
            return e;
        };
        const bool right = v.sync != NO_WAIT && v.product != NONE && !v.dry;   // a result that means something
        const int layout = v.splits * 2 + v.interleaved, arithmetic = layout * 4 + v.product;
        if (right && !references.count(layout)) references[layout] = b.reference(s);
        b.prepare();
        launch();
        unsigned failed = error();
        double off_logits = 0, off_state = 0;
        const char* same = "-";
        if (right && !failed) {
            const Result once = b.result();
            off_logits = distance(once.logits, references[layout].logits), off_state = distance(once.state, references[layout].state);
            for (int i = 1; i < 20; ++i) launch();
            const uint64_t bits = digest(once) * 31 + digest(b.result());     // after one step and after twenty
            same = !digests.count(arithmetic) ? "first" : digests[arithmetic] == bits ? "yes" : "NO";
            digests.emplace(arithmetic, bits);
            failed = error();
        }
        if (failed) {
            printf("%-32s FAILED: wait %u of block %u ran out\n", v.name, failed >> 16, failed >> 8 & 255), ++failures;
            fprintf(json, "%s\n  {\"name\": \"%s\", \"failed_wait\": %u}", first_record ? "" : ",", v.name, failed >> 16);
            continue;
        }
        const Times t = time_of(launch, launches, b.stream);
        const float in_a_row = time_of([&] { for (int i = 0; i < 20; ++i) launch(); }, 20, b.stream).median / 20;
        failed = error();
        const bool wrong = failed || (right && !(off_logits <= 5e-3 && off_state <= 5e-3)) || *same == 'N';
        failures += wrong;
        std::vector<unsigned> cycles(BLOCKS * SEGMENTS);
        CHECK(cudaMemcpy(cycles.data(), m.segments, cycles.size() * 4, cudaMemcpyDeviceToHost));
        double all = 0, segment[SEGMENTS] = {};
        for (int i = 0; i < BLOCKS * SEGMENTS; ++i) segment[i % SEGMENTS] += cycles[i], all += cycles[i];
        printf("%-32s %8.1f %7.1f %7.1f %8.1f %6.2f  %.2e %.2e  %-9s |", v.name, t.median, t.low, t.high, in_a_row, v.dry ? 0 : WEIGHT_BYTES / t.median / 1e6,
               off_logits, off_state, same);
        for (double c : segment) printf(" %.1f", c / all * t.median);
        printf("%s\n", wrong ? "  WRONG" : "");
        fflush(stdout);
        fprintf(json, "%s\n  {\"name\": \"%s\", \"us\": %.2f, \"low\": %.2f, \"high\": %.2f, \"in_a_row_us\": %.2f, \"error_logits\": %.3e, \"error_state\": %.3e, \"same\": \"%s\", "
                "\"wrong\": %s, \"sync\": %d, \"product\": %d, \"splits\": %d, \"chunk_kb\": %d, \"ring_kb\": %d, \"flight_kb\": %d, \"ahead\": %d, "
                "\"overlap\": %d, \"interleaved\": %d, \"evict_first\": %d, \"nap\": %d, \"dry\": %d, \"cooperative\": %d, \"segments_us\": {",
                first_record ? "" : ",", v.name, t.median, t.low, t.high, in_a_row, std::isnan(off_logits) ? -1 : off_logits, std::isnan(off_state) ? -1 : off_state,
                same, wrong ? "true" : "false", v.sync, v.product, v.splits, v.chunk_kb, v.ring_kb, v.flight_kb, v.ahead, v.overlap, v.interleaved,
                v.evict, v.nap, v.dry, v.cooperative);
        for (int i = 0; i < SEGMENTS; ++i) fprintf(json, "%s\"%s\": %.2f", i ? ", " : "", SEGMENT_NAMES[i], segment[i] / all * t.median);
        fprintf(json, "}}");
        first_record = false;
        fflush(json);
    }
    printf("%d variants failed or were wrong (tolerance 5e-3 of the 2-norm; same bits wherever arithmetic is the same)\n", failures);
    finish(failures ? 1 : 0);
}
