// DijiangAttention of one token a row: a block has some columns of a head's state, for all rows.
#pragma once

#include "attention/rotary.cuh"
#include "attention/terms.cuh"
#include "step/residual.cuh"

namespace dijiang {
namespace step {

// What is asked for early, as registers allow: elements of a row's state, and units of P.
template <int R> constexpr int kStatesAhead = R == 1 ? 4 : R < 8 ? 2 : 1;
constexpr int kProjAhead = kManyLooks == 16 ? 6 : 4;

// Where a thread works in an item: one column, every sets-th feature from `first` on.
struct ItemPlace {
    int head, kv_head, split, column, first;
    bool item, active;  // is there such an item; has this thread a part of its state
    int state;  // elements of a row's state before this thread's first

    __device__ __forceinline__ ItemPlace(const Params& p, int number) {
        const int d = p.layout.head_dim;
        head = divide(number, p.by_splits);
        kv_head = divide(head, p.by_sharing);
        split = number - head * p.splits;
        const uint32_t thread = kept(threadIdx.x);
        first = divide(thread, p.by_columns);
        column = thread - first * p.columns;
        item = number < p.layout.heads * p.splits;
        active = item && first < p.sets && first < d;
        state = (head * d + first) * d + split * p.columns + column;
    }
};

// Some of a thread's elements of the state, of all rows: every sets-th feature from one on.
template <int R> struct StatePart {
    float of[R][kStatesAhead<R>];

    __device__ __forceinline__ void request(const Params& p, bool active, const float* mine, int from) {
        const int d = p.layout.head_dim, apart = p.sets * d;
#pragma unroll
        for (int j = 0; j < kStatesAhead<R>; ++j) {
            const bool there = active && from + j * p.sets < d;
#pragma unroll
            for (int r = 0; r < R; ++r) of[r][j] = there && r < p.rows ? mine[r * p.state_row_stride + j * apart] : 0.0f;
        }
    }
};

// Some of a warp's units of P: it has every eighth group of eight features, a unit for each 32 of u's numbers.
struct ProjPart {
    uint4 of[kProjAhead];

    template <typename C> __device__ __forceinline__ void request(const C& c, int group, int chunk) {
        const int chunks = Constants::proj_chunks(c.p.layout), groups = c.p.layout.head_dim / kGroup;
        const uint4* const units = c.template constant<uint4>(c.p.places.proj) + kept(threadIdx.x) % 32;
#pragma unroll
        for (int i = 0; i < kProjAhead; ++i) {
            of[i] = __ldg(units + (group < groups ? (group * chunks + chunk) * 32 : 0));
            if (++chunk == chunks) chunk = 0, group += kWarps;
        }
    }
};

// Two slots that a thread waits for, and where their values go: two that RoPE turns, of q or k; two values; two gates.
struct Taken {
    int turned, gates;
    int from, apart;  // the first slot, and how far the second is
    float2 turn;
    int to, other;          // places of both

    template <typename T, int R>
    __device__ __forceinline__ Taken(const Context<T, R>& c, const ItemPlace& at, int i) {
        const Params& p = c.p;
        const int d = p.layout.head_dim, half = p.layout.rotary_dim / 2, columns = p.columns, each = d + columns;
        const int row = R == 1 ? 0 : divide(i, p.by_taken), rest = i - row * each;
        turned = rest < d;
        const bool second = turned ? rest >= d / 2 : rest >= d + columns / 2;
        const int pair = turned ? rest - (second ? d / 2 : 0) : rest - d - (second ? columns / 2 : 0);
        const int key = (p.layout.heads + at.kv_head) * d, value = key + p.layout.kv_heads * d + at.split * columns;
        const int gate = p.layout.qkv() + at.head * d + at.split * columns;
        const bool turns = turned && pair < half;
        const int a = turns ? pair : 2 * pair, b = turns ? pair + half : 2 * pair + 1;
        gates = !turned && second;
        from = row * (p.layout.qkv() + p.layout.width()) + a + (turned ? second ? key : at.head * d : second ? gate : value);
        apart = b - a;
        turn = turns ? c.template in_shared<float2>(p.memory.rotary)[row * half + pair] : make_float2(1.0f, 0.0f);
        to = turned ? turned_place<R>(second * R + row, a) : (row * columns + a) / (second ? 2 : 1);
        other = turned_place<R>(second * R + row, b);
    }
    template <int R> static __device__ __forceinline__ int turned_place(int row, int k) {
        return (k / kChunk * (2 * R) + row) * kChunk + k % kChunk;
    }
};

// u P of all rows' q and k: [2 rows][d], a warp eight features at a time. `part` has the warp's first units.
template <typename T, int R> __device__ __forceinline__ void project(Context<T, R>& c, ProjPart& part) {
    const Params& p = c.p;
    const int d = p.layout.head_dim, chunks = Constants::proj_chunks(p.layout), groups = d / kGroup;
    const uint32_t thread = kept(threadIdx.x);
    const int lane = thread % 32, row = R == 8 ? lane / 4 : lane / 4 % R, quarter = lane % 4;
    const uint4* const high = c.template in_shared<uint4>(p.memory.turned) + row * 4 + quarter;
    const uint4* const low = high + chunks * (2 * R * kChunk / 8);
    float* const features = c.template in_shared<float>(p.memory.features) + row * d + 2 * quarter;
    float sums[4] = {}, rest[4] = {};
    int group = thread / 32, chunk = 0;
#pragma unroll 1
    while (group < groups) {
#pragma unroll
        for (int j = 0; j < kProjAhead; ++j) {
            if (group >= groups) break;
            const uint4 w = part.of[j];
            const int at = chunk * (2 * R * kChunk / 8);
            const uint4 q = high[at], k = high[at + R * 4], s = low[at], t = low[at + R * 4];
            mma<T>(sums, {q.x, k.x, q.y, k.y}, w.x, w.y);
            mma<T>(rest, {s.x, t.x, s.y, t.y}, w.x, w.y);
            mma<T>(sums, {q.z, k.z, q.w, k.w}, w.z, w.w);
            mma<T>(rest, {s.z, t.z, s.w, t.w}, w.z, w.w);
            if (++chunk < chunks) continue;
            if (lane / 4 < R) {
                float2* const to = reinterpret_cast<float2*>(features + group * kGroup);
                to[0] = make_float2(sums[0] + rest[0], sums[1] + rest[1]);
                to[R * d / 2] = make_float2(sums[2] + rest[2], sums[3] + rest[3]);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[i] = rest[i] = 0.0f;
            chunk = 0;
            group += kWarps;
        }
        if (group < groups) part.request(c, group, chunk);
    }
}

// Softmax over each of the 2 R rows of features, a warp a row, in place; a lane has up to kEach of a row's numbers.
template <int kEach, int R> __device__ __forceinline__ void softmax(float* features, int d) {
    const uint32_t thread = kept(threadIdx.x);
    const int lane = thread % 32;
#pragma unroll 1
    for (int row = thread / 32; row < 2 * R; row += kWarps) {
        float* const mine = features + row * d + lane;
        float e[kEach], most = -INFINITY, total = 0.0f;
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            e[i] = lane + 32 * i < d ? mine[32 * i] : -INFINITY;
            most = fmaxf(most, e[i]);
        }
        most = warp_max(most) * kLog2E;
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            e[i] = fast_exp2(fmaf(e[i], kLog2E, -most));
            total += e[i];
        }
        const float inverse = __fdividef(1.0f, warp_sum(total));
#pragma unroll
        for (int i = 0; i < kEach; ++i)
            if (lane + 32 * i < d) mine[32 * i] = e[i] * inverse;
    }
}
template <int R> __device__ __forceinline__ void softmax(float* features, int d) {
    if (d <= 96) softmax<3, R>(features, d);
    else softmax<8, R>(features, d);
}

// What a block asked for before it is needed: the state of its first item, and P.
template <int R> struct Requests {
    StatePart<R> state;
    ProjPart proj;
};

// This block's part of attention. What does not change from layer to layer is found once.
template <typename T, int R> class Attention {
public:
    __device__ __forceinline__ explicit Attention(const Context<T, R>& c)
        : place_(c.p, blockIdx.x),
          taken_(c, place_, min(static_cast<int>(threadIdx.x), R * (c.p.layout.head_dim + c.p.columns) - 1)) {
        if (R > 1) return;
        taken_.turned = kept(taken_.turned);
        taken_.gates = kept(taken_.gates);
        taken_.from = kept(taken_.from);
        taken_.apart = kept(taken_.apart);
        taken_.to = kept(taken_.to);
        taken_.other = kept(taken_.other);
        place_.first = kept(place_.first);
        place_.state = kept(place_.state);
    }

    // Asks for the state of this block's first item, and for P, both needed later.
    __device__ __forceinline__ void request_state(const Context<T, R>& c, Requests<R>& asked, int layer) const {
        const ItemPlace at = R == 1 ? place_ : ItemPlace(c.p, blockIdx.x);
        asked.state.request(c.p, at.active, c.p.states[layer] + at.state, at.first);
    }
    __device__ __forceinline__ void request_proj(const Context<T, R>& c, Requests<R>& asked) const {
        asked.proj.request(c, kept(threadIdx.x) / 32, 0);
    }
    // Has the state of this block's first item brought to L2: of each feature the line that its columns begin in, and that
    // they end in.
    __device__ __forceinline__ void prefetch_state(const Context<T, R>& c, int layer) const {
        const Params& p = c.p;
        const int d = p.layout.head_dim;
        const ItemPlace at(p, blockIdx.x);
        if (!at.item || layer >= p.layout.layers) return;
        const float* const first = p.states[layer] + at.head * d * d + at.split * p.columns;
#pragma unroll 1
        for (int i = kept(threadIdx.x); i < 2 * d * p.rows; i += kThreads) {
            const int row = R == 1 ? 0 : i / (2 * d), rest = i - row * 2 * d;
            prefetch(first + row * p.state_row_stride + rest / 2 * d + rest % 2 * (p.columns - 1));
        }
    }
    // All of this block's items. kAsks: nothing was asked for; each item asks for its state and P behind its first looks.
    template <bool kAsks> __device__ __forceinline__ void run(Context<T, R>& c, Requests<R>& asked, int layer) {
        const Params& p = c.p;
        const int items = p.layout.heads * p.splits;
        if (static_cast<int>(blockIdx.x) >= items) return;
#pragma unroll 1
        for (int item = blockIdx.x;;) {
            const bool first = item == static_cast<int>(blockIdx.x), last = item + static_cast<int>(gridDim.x) >= items;
            const ItemPlace at = !kAsks && first && R == 1 ? place_ : ItemPlace(p, item);
            c.set_waiting(true);
            take<kAsks>(c, at, first, asked, p.states[layer]);
            meet();
            c.set_waiting(false);
            project(c, asked.proj);
            meet();
            softmax<R>(c.template in_shared<float>(p.memory.features), p.layout.head_dim);
            meet();
            update(c, at, kAsks || first, asked.state, p.states[layer]);
            meet();
            send(c, at);
            if (last) return;
            meet();  // or the next item's values would be here too early
            item += gridDim.x;
            if (!kAsks) request_proj(c, asked);
        }
    }

private:
    ItemPlace place_;
    Taken taken_;

    // q and k of a head: RoPE, then each number as the sum of two of T, as A of an mma: rows 0 to 7 are the rows' q, 8 to
    // 15 their k. Values, gates and the recurrence's terms besides.
    template <bool kAsks>
    __device__ __forceinline__ void take(Context<T, R>& c, const ItemPlace& at, bool first, Requests<R>& asked, const float* states) {
        const Params& p = c.p;
        T* const high = c.template in_shared<T>(p.memory.turned);
        T* const low = high + Constants::proj_chunks(p.layout) * 2 * R * kChunk;
        const int all = R * (p.layout.head_dim + p.columns);
        Taken it = taken_;
        // Threads beyond the last look at nothing of their own either: what is not theirs may be written meanwhile.
        if (R > 1 || !first) it = Taken(c, at, min(static_cast<int>(kept(threadIdx.x)), all - 1));
        uint2 one, other;
        const auto look_at_both = [&] {
            const uint2* const from = c.template in_sync<uint2>(p.exchange.qkvg) + it.from;
            one = look(from);
            other = look(from + it.apart);
            return one.y == c.tag && other.y == c.tag;
        };
        bool there = false;
        if (kAsks) {  // all of it is under way at once: looks behind what was asked for would wait for that
            there = look_at_both();
            asked.state.request(p, at.active, states + at.state, at.first);
            request_proj(c, asked);
        }
#pragma unroll 1
        for (int i = kept(threadIdx.x); i < all;) {
            if (!kAsks || !there) await(look_at_both);
            there = false;
            const float u = __uint_as_float(one.x), v = __uint_as_float(other.x);
            if (it.turned) {
                const auto leave = [&](int to, float w) {
                    const T upper = from_float<T>(w);
                    high[to] = upper;
                    low[to] = from_float<T>(w - to_float(upper));
                };
                leave(it.to, u * it.turn.x - v * it.turn.y);
                leave(it.other, v * it.turn.x + u * it.turn.y);
            } else if (it.gates) {
                c.template in_shared<uint32_t>(p.memory.opened)[it.to] = pack<T>(u, v);
            } else {
                *reinterpret_cast<float2*>(c.template in_shared<float>(p.memory.values) + it.to) = make_float2(u, v);
            }
            i += kThreads;
            if (i >= all) break;
            it = Taken(c, at, i);
        }
        const int row = kThreads - 1 - static_cast<int>(kept(threadIdx.x));  // of threads that had nothing to wait for
        if (row < R) take_terms(c, at, row);
    }
    __device__ __forceinline__ void take_terms(Context<T, R>& c, const ItemPlace& at, int row) {
        const Layout& layout = c.p.layout;
        const int64_t n = layout.table_rows, heads = layout.heads, position = c.facts().position[row];
        const int64_t entry = position < n - 1 ? position : n > 0 ? n - 1 : 0;
        const float* from = c.template constant(c.p.places.terms) + entry * heads + at.head;
        float* terms = c.template in_shared<float>(c.p.memory.terms) + 3 * row;
        terms[0] = fast_exp2(fmaxf(__ldg(from), kLeastLogDecay) * kLog2E);
        terms[1] = n == 0 ? 1.0f : __ldg(from + n * heads);
        terms[2] = n == 0 ? 1.0f : __ldg(from + 2 * n * heads);
    }

    // Fades and writes this thread's part of the state, and reads it: partial outputs for the block.
    __device__ __forceinline__ void update(Context<T, R>& c, const ItemPlace& at, bool asked, StatePart<R>& ahead,
                                           float* states) {
        const Params& p = c.p;
        const int d = p.layout.head_dim, columns = p.columns;
        const float* const features = c.template in_shared<float>(p.memory.features);
        const float* const values = c.template in_shared<float>(p.memory.values) + at.column;
        const float* const terms = c.template in_shared<float>(p.memory.terms);
        float out[R] = {};
        const int each = kStatesAhead<R> * p.sets;  // features of one go
#pragma unroll 1
        for (int start = at.first; at.active && start < d; start += each) {
            float* const mine = states + at.state + (start - at.first) * d;
            if (!asked || start != at.first) ahead.request(p, true, mine, start);
#pragma unroll
            for (int j = 0; j < kStatesAhead<R>; ++j) {
                const int f = start + j * p.sets;
                if (f >= d) break;
#pragma unroll
                for (int r = 0; r < R; ++r) {
                    const float written = terms[3 * r + 1] * features[(R + r) * d + f] * values[r * columns];
                    const float s = fmaf(terms[3 * r], ahead.of[r][j], written);
                    if (c.facts().valid[r]) mine[r * p.state_row_stride + j * p.sets * d] = s;
                    out[r] = fmaf(features[r * d + f], s, out[r]);
                }
            }
        }
        float* const readout = c.template in_shared<float>(p.memory.readout);
        const uint32_t thread = kept(threadIdx.x);
        if (p.entries == kWarps) {  // columns divide a warp
#pragma unroll
            for (int r = 0; r < R; ++r) {
#pragma unroll 1
                for (int offset = columns; offset < 32; offset *= 2) out[r] += __shfl_xor_sync(~0u, out[r], offset);
                if (static_cast<int>(thread % 32) < columns)
                    readout[(r * kWarps + thread / 32) * columns + at.column] = out[r];
            }
        } else if (at.first < p.sets) {
#pragma unroll
            for (int r = 0; r < R; ++r) readout[(r * p.sets + at.first) * columns + at.column] = out[r];
        }
    }

    // Adds up the outputs of this item's columns, and sends each pair with its gates.
    __device__ __forceinline__ void send(Context<T, R>& c, const ItemPlace& at) {
        const Params& p = c.p;
        const int pairs = p.columns / 2;
#pragma unroll 1
        for (int i = kept(threadIdx.x); i < R * pairs; i += kThreads) {
            const int row = R == 1 ? 0 : i / pairs, pair = i - row * pairs;
            const float2* const from = c.template in_shared<float2>(p.memory.readout) + row * p.entries * pairs + pair;
            float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll 4
            for (int e = 0; e < p.entries; ++e) {
                const float2 o = from[e * pairs];
                sum.x += o.x;
                sum.y += o.y;
            }
            const float read = c.template in_shared<float>(p.memory.terms)[3 * row + 2];
            const int channel = at.head * p.layout.head_dim + at.split * p.columns + 2 * pair;
            put(c.template in_sync<uint4>(p.exchange.attention) + (row * p.layout.width() + channel) / 2,
                __float_as_uint(sum.x * read), __float_as_uint(sum.y * read),
                c.template in_shared<uint32_t>(p.memory.opened)[i], c.tag);
        }
    }
};

}  // namespace step
}  // namespace dijiang
