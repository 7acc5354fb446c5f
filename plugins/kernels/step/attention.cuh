// DijiangAttention of one token a row: a block has some columns of a head's state, for all rows.
#pragma once

#include "attention/decode/norm.cuh"
#include "attention/rotary.cuh"
#include "attention/terms.cuh"
#include "step/residual.cuh"

namespace dijiang {
namespace step {

template <int R> constexpr int kStatesAhead = R >= 4 ? 1 : 4 / R;  // of a row, a thread's, asked for early
constexpr int kProjAhead = 2;                                      // units of P, while q and k are waited for

// Where a thread works in an item: one column, every sets-th feature from `first` on.
struct ItemPlace {
    int head, kv_head, split, column, first, sets;
    bool active;

    __device__ __forceinline__ ItemPlace(const Params& p, int item) {
        head = Cut::divide(item, p.by_splits);
        kv_head = Cut::divide(head, p.by_sharing);
        split = item - head * p.splits;
        sets = p.sets;
        first = Cut::divide(threadIdx.x, p.by_columns);
        column = threadIdx.x - first * p.columns;
        active = first < sets && first < p.layout.head_dim;
    }
    // Elements of a row's state before this thread's of feature f.
    __device__ __forceinline__ int64_t state(const Params& p, int f) const {
        return (int64_t{head} * p.layout.head_dim + f) * p.layout.head_dim + split * p.columns + column;
    }
};

// Some of a thread's elements of the state, of all rows: features first + j * sets.
template <int R> struct StatePart {
    float of[R][kStatesAhead<R>];

    __device__ __forceinline__ void request(const Params& p, const ItemPlace& at, int first, const float* states) {
#pragma unroll
        for (int j = 0; j < kStatesAhead<R>; ++j) {
            const int f = first + j * at.sets;
#pragma unroll
            for (int r = 0; r < R; ++r)
                of[r][j] = at.active && f < p.layout.head_dim && r < p.rows ? states[r * p.state_row_stride + at.state(p, f)]
                                                                             : 0.0f;
        }
    }
};

// P's units for a warp's first eight features.
struct ProjPart {
    uint4 of[kProjAhead];

    template <typename C> __device__ __forceinline__ explicit ProjPart(const C& c) {
        const int chunks = Constants::proj_chunks(c.p.layout), warp = threadIdx.x / 32;
        const uint4* units = c.template constant<uint4>(c.p.places.proj);
#pragma unroll
        for (int i = 0; i < kProjAhead; ++i)
            of[i] = warp < c.p.layout.head_dim / kGroup && i < chunks
                        ? __ldg(units + (warp * chunks + i) * 32 + threadIdx.x % 32)
                        : make_uint4(0, 0, 0, 0);
    }
};

// q and k of a head: RoPE, then each number as the sum of two of T, as A of an mma: rows 0 to 7 are the rows' q, 8 to 15
// their k. Values, gates and the recurrence's terms besides.
template <typename T, int R>
__device__ __forceinline__ void take_head(Context<T, R>& c, const ItemPlace& at) {
    const Params& p = c.p;
    const int d = p.layout.head_dim, half = p.layout.rotary_dim / 2, all = p.layout.qkv() + p.layout.width();
    const int chunks = Constants::proj_chunks(p.layout);
    const int key = (p.layout.heads + at.kv_head) * d, value = key + p.layout.kv_heads * d + at.split * p.columns;
    const int gate = p.layout.qkv() + at.head * d + at.split * p.columns;
    const uint2* slots = c.template in_sync<uint2>(p.exchange.qkvg);
    T* high = c.template in_shared<T>(p.memory.turned);
    T* low = high + chunks * 2 * R * kChunk;
    const float2* rotary = c.template in_shared<float2>(p.memory.rotary);
    float* values = c.template in_shared<float>(p.memory.values);
    uint32_t* opened = c.template in_shared<uint32_t>(p.memory.opened);
    const int pairs = R * d, all_values = pairs + R * p.columns, everything = all_values + R * p.columns / 2;
    for (int i = threadIdx.x; i < everything; i += kThreads) {
        if (i >= all_values) {  // two gates
            const int j = i - all_values, row = R == 1 ? 0 : j / (p.columns / 2), pair = j - row * (p.columns / 2);
            uint4 g;
            await([&] {
                g = look_at_two(slots + row * all + gate + 2 * pair);
                return g.y == c.tag && g.w == c.tag;
            });
            opened[j] = pack<T>(__uint_as_float(g.x), __uint_as_float(g.z));
            continue;
        }
        if (i >= pairs) {  // a value
            const int j = i - pairs, row = R == 1 ? 0 : j / p.columns, column = j - row * p.columns;
            uint2 x;
            await([&] {
                x = look(slots + row * all + value + column);
                return x.y == c.tag;
            });
            values[j] = __uint_as_float(x.x);
            continue;
        }
        const int row = R == 1 ? 0 : i / d, rest = i - row * d, kind = rest >= d / 2, pair = rest - kind * (d / 2);
        const int a = pair < half ? pair : 2 * pair, b = pair < half ? pair + half : 2 * pair + 1;
        const uint2* from = slots + row * all + (kind ? key : at.head * d);
        uint2 x, y;
        await([&] {
            x = look(from + a);
            y = look(from + b);
            return x.y == c.tag && y.y == c.tag;
        });
        const float2 turn = pair < half ? rotary[row * half + pair] : make_float2(1.0f, 0.0f);
        const float first = __uint_as_float(x.x), second = __uint_as_float(y.x);
        const float u = first * turn.x - second * turn.y, v = second * turn.x + first * turn.y;
        const int place = (kind * R + row) * kChunk;
        const auto leave = [&](int k, float w) {
            const T upper = from_float<T>(w);
            const int to = k / kChunk * (2 * R * kChunk) + place + k % kChunk;
            high[to] = upper;
            low[to] = from_float<T>(w - to_float(upper));
        };
        leave(a, u);
        leave(b, v);
    }
    const int mine = kThreads - 1 - static_cast<int>(threadIdx.x);  // a row, of threads that had nothing to wait for
    if (mine < R) {
        const float* tables = c.template constant(c.p.places.terms);
        const int64_t n = p.layout.table_rows, heads = p.layout.heads, position = c.facts().position[mine];
        const int64_t row = n == 0 ? 0 : (position < n - 1 ? position : n - 1);
        const float* from = tables + row * heads + at.head;
        float* terms = c.template in_shared<float>(p.memory.terms) + 3 * mine;
        terms[0] = expf(fmaxf(__ldg(from), kLeastLogDecay));
        terms[1] = n == 0 ? 1.0f : __ldg(from + n * heads);
        terms[2] = n == 0 ? 1.0f : __ldg(from + 2 * n * heads);
    }
}

// u P of all rows' q and k: [2 rows][d], a warp eight features at a time.
template <typename T, int R>
__device__ __forceinline__ void project(Context<T, R>& c, const ProjPart& ahead) {
    const Params& p = c.p;
    const int d = p.layout.head_dim, chunks = Constants::proj_chunks(p.layout), warp = threadIdx.x / 32;
    const int lane = threadIdx.x % 32, row = lane / 4 < R ? lane / 4 : 0, quarter = lane % 4;
    const uint4* high = c.template in_shared<uint4>(p.memory.turned) + quarter;
    const uint4* units = c.template constant<uint4>(c.p.places.proj);
    float* features = c.template in_shared<float>(p.memory.features);
    for (int group = warp; group < d / kGroup; group += kWarps) {
        float sums[4] = {}, rest[4] = {};
#pragma unroll 1
        for (int start = 0; start < chunks; start += kProjAhead)
#pragma unroll
        for (int j = 0; j < kProjAhead; ++j) {
            const int i = start + j;
            if (i >= chunks) continue;
            const uint4 w = start == 0 && group == warp ? ahead.of[j] : __ldg(units + (group * chunks + i) * 32 + lane);
            const uint4* from = high + i * (2 * R * kChunk / 8);
            const uint4* from_low = from + chunks * (2 * R * kChunk / 8);
            const uint4 q = from[row * 4], k = from[(R + row) * 4];
            mma<T>(sums, {q.x, k.x, q.y, k.y}, w.x, w.y);
            mma<T>(sums, {q.z, k.z, q.w, k.w}, w.z, w.w);
            const uint4 s = from_low[row * 4], t = from_low[(R + row) * 4];
            mma<T>(rest, {s.x, t.x, s.y, t.y}, w.x, w.y);
            mma<T>(rest, {s.z, t.z, s.w, t.w}, w.z, w.w);
        }
        if (lane / 4 < R) {
            float2* to = reinterpret_cast<float2*>(features + row * d + group * kGroup + 2 * quarter);
            to[0] = make_float2(sums[0] + rest[0], sums[1] + rest[1]);
            to[R * d / 2] = make_float2(sums[2] + rest[2], sums[3] + rest[3]);
        }
    }
}

// Softmax over each of the 2 R rows of features, a warp a row, in place.
template <int R> __device__ __forceinline__ void softmax(float* features, int d) {
    const int lane = threadIdx.x % 32;
    for (int row = threadIdx.x / 32; row < 2 * R; row += kWarps) {
        float* mine = features + row * d;
        float most = -INFINITY, total = 0.0f;
        for (int f = lane; f < d; f += 32) most = fmaxf(most, mine[f]);
        most = warp_max(most);
        for (int f = lane; f < d; f += 32) {
            const float e = fast_exp2((mine[f] - most) * kLog2E);
            mine[f] = e;
            total += e;
        }
        const float inverse = 1.0f / warp_sum(total);
        for (int f = lane; f < d; f += 32) mine[f] *= inverse;
    }
}

// Fades and writes this thread's part of the state, and reads it: partial outputs for the block.
template <typename T, int R>
__device__ __forceinline__ void update(Context<T, R>& c, const ItemPlace& at, const StatePart<R>& ahead, bool first_item,
                                       float* states) {
    const Params& p = c.p;
    const int d = p.layout.head_dim, columns = p.columns;
    const float* features = c.template in_shared<float>(p.memory.features);
    const float* values = c.template in_shared<float>(p.memory.values);
    const float* terms = c.template in_shared<float>(p.memory.terms);
    float out[R] = {};
    const int each = kStatesAhead<R> * at.sets;  // features of one go
    for (int start = at.first; at.active && start < d; start += each) {
        StatePart<R> part = ahead;
        if (!first_item || start != at.first) part.request(p, at, start, states);
#pragma unroll
        for (int j = 0; j < kStatesAhead<R>; ++j) {
            const int f = start + j * at.sets;
            if (f >= d) break;
#pragma unroll
            for (int r = 0; r < R; ++r) {
                const float written = terms[3 * r + 1] * features[(R + r) * d + f] * values[r * columns + at.column];
                const float s = fmaf(terms[3 * r], part.of[r][j], written);
                if (c.facts().valid[r]) states[r * p.state_row_stride + at.state(p, f)] = s;
                out[r] = fmaf(features[r * d + f], s, out[r]);
            }
        }
    }
    float* readout = c.template in_shared<float>(p.memory.readout);
    if (p.entries == kWarps) {  // columns divide a warp
#pragma unroll
        for (int r = 0; r < R; ++r) {
            for (int offset = columns; offset < 32; offset *= 2) out[r] += __shfl_xor_sync(~0u, out[r], offset);
            if (static_cast<int>(threadIdx.x % 32) < columns)
                readout[(r * kWarps + threadIdx.x / 32) * columns + at.column] = out[r];
        }
    } else if (at.first < at.sets) {
#pragma unroll
        for (int r = 0; r < R; ++r) readout[(r * at.sets + at.first) * columns + at.column] = out[r];
    }
}

// Adds up the outputs of this item's columns, four threads a pair, and sends each pair with its gates.
template <typename T, int R> __device__ __forceinline__ void send_outputs(Context<T, R>& c, const ItemPlace& at) {
    constexpr int kLanes = 4;
    const Params& p = c.p;
    const int pairs = p.columns / 2, total = R * pairs * kLanes;
    const float2* readout = c.template in_shared<float2>(p.memory.readout);
    for (int start = threadIdx.x / 32 * 32; start < total; start += kThreads) {
        const int t = start + threadIdx.x % 32, i = t / kLanes, row = R == 1 ? 0 : i / pairs, pair = i - row * pairs;
        float2 sum = make_float2(0.0f, 0.0f);
        if (t < total) {
#pragma unroll 4
            for (int e = t % kLanes; e < p.entries; e += kLanes) {
                const float2 o = readout[(row * p.entries + e) * pairs + pair];
                sum.x += o.x;
                sum.y += o.y;
            }
        }
        sum = make_float2(sum_of_lanes(sum.x, kLanes), sum_of_lanes(sum.y, kLanes));
        if (t >= total || t % kLanes != 0) continue;
        const float read = c.template in_shared<float>(p.memory.terms)[3 * row + 2];
        const int channel = at.head * p.layout.head_dim + at.split * p.columns + 2 * pair;
        put(c.template in_sync<uint4>(p.exchange.attention) + (row * p.layout.width() + channel) / 2,
            __float_as_uint(sum.x * read), __float_as_uint(sum.y * read),
            c.template in_shared<uint32_t>(p.memory.opened)[i], c.tag);
    }
}

// All of this block's items. `ahead` is the first one's state, asked for before anything was waited for.
template <typename T, int R>
__device__ __forceinline__ void attention(Context<T, R>& c, int layer, const StatePart<R>& ahead) {
    const Params& p = c.p;
    const int items = p.layout.heads * p.splits;
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
        const bool first = item == static_cast<int>(blockIdx.x);
        const ItemPlace at(p, item);
        const ProjPart proj(c);
        take_head(c, at);
        meet();
        project(c, proj);
        meet();
        softmax<R>(c.template in_shared<float>(p.memory.features), p.layout.head_dim);
        meet();
        update(c, at, ahead, first, p.states[layer]);
        meet();
        send_outputs(c, at);
        if (item + static_cast<int>(gridDim.x) < items) meet();  // or the next item's values would be here too early
    }
}

// --- taking attention's outputs: GroupNorm over the heads' concatenation, affine, gate ---

// One pair of channels, normalised, to where the product reads it.
template <typename T, int R>
__device__ __forceinline__ void leave_attended(Context<T, R>& c, int row, int pair, float2 o, uint32_t gates, float2 weight,
                                               float2 bias) {
    const float2 g = unpack<T>(gates);
    c.template in_shared<uint32_t>(c.p.memory.attended)[x_index<R>(row, 2 * pair) / 2] =
        pack<T>(fmaf(o.x, weight.x, bias.x) * silu(g.x), fmaf(o.y, weight.y, bias.y) * silu(g.y));
}

// Where groups of H channels are 2, 4, .. 64: H / 2 neighbouring lanes, as decode::normalise_group computes.
__device__ __forceinline__ float2 normalise_in_lanes(float2 o, int heads, float epsilon) {
    constexpr float kShrink = 1.0f / 1024.0f;
    float largest = fmaxf(fabsf(o.x), fabsf(o.y)), sum = o.x * kShrink + o.y * kShrink;
    for (int offset = heads / 4; offset > 0; offset /= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, offset));
        sum += __shfl_xor_sync(~0u, sum, offset);
    }
    const float inverse_heads = 1.0f / static_cast<float>(heads);
    const uint32_t exponent = __float_as_uint(fmaxf(largest, 1.0f)) >> 23;
    const float shrink = __uint_as_float((254u - (exponent < 253u ? exponent : 253u)) << 23);
    const float mean = sum * shrink * (inverse_heads / kShrink);
    const float2 centred = make_float2(__fmul_rn(o.x, shrink) - mean, __fmul_rn(o.y, shrink) - mean);
    float squares = centred.x * centred.x + centred.y * centred.y;
    for (int offset = heads / 4; offset > 0; offset /= 2) squares += __shfl_xor_sync(~0u, squares, offset);
    const float inverse = rsqrtf(squares * inverse_heads + fmaxf(epsilon * shrink * shrink, kLeastEpsilon));
    return make_float2(centred.x * inverse, centred.y * inverse);
}

__device__ __forceinline__ bool groups_fit_lanes(int heads) { return heads >= 2 && heads <= 64 && (heads & (heads - 1)) == 0; }

template <typename T, int R>
__device__ __forceinline__ void take_attention(Context<T, R>& c, const Affine& affine) {
    const Params& p = c.p;
    const int width = p.layout.width(), pairs = width / 2, heads = p.layout.heads;
    const uint4* slots = c.template in_sync<uint4>(p.exchange.attention);
    const bool in_lanes = groups_fit_lanes(heads);
    constexpr int kAtOnce = R < 4 ? R : 4;  // rows
    float2* outputs = c.template in_shared<float2>(p.memory.outputs);
    uint32_t* gates = c.template in_shared<uint32_t>(p.memory.gates);
    for (int pair0 = threadIdx.x / 32 * 32; pair0 < pairs; pair0 += kThreads) {
        const int pair = pair0 + threadIdx.x % 32, there = pair < pairs, at = there ? pair : 0;
#pragma unroll
        for (int first = 0; first < R; first += kAtOnce) {
            uint4 v[kAtOnce];
            await([&] {
                bool all = true;
#pragma unroll
                for (int i = 0; i < kAtOnce; ++i) {
                    v[i] = look(slots + (first + i) * pairs + at);
                    all &= v[i].w == c.tag;
                }
                return all;
            });
            __syncwarp();
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const int row = first + i;
                float2 o = make_float2(__uint_as_float(v[i].x), __uint_as_float(v[i].y));
                if (in_lanes) {
                    o = normalise_in_lanes(o, heads, p.group_norm_epsilon);
                    if (there) leave_attended(c, row, pair, o, v[i].z, affine.weight(c, pair), affine.bias(c, pair));
                } else if (there) {
                    outputs[row * pairs + pair] = o;
                    gates[row * pairs + pair] = v[i].z;
                }
            }
        }
    }
    meet();
    if (in_lanes) return;
    T* attended = c.template in_shared<T>(p.memory.attended);
    const float* weight = c.constant(affine.place);
    const float* bias = weight + width;
    for (int i = threadIdx.x / 32; i < R * p.layout.head_dim; i += kWarps) {
        const int row = i / p.layout.head_dim, base = (i - row * p.layout.head_dim) * heads;
        const float* group = reinterpret_cast<const float*>(outputs) + row * width + base;
        const T* gate = reinterpret_cast<const T*>(gates) + row * width + base;
        decode::normalise_group(
            heads, 1.0f / static_cast<float>(heads), p.group_norm_epsilon, [&](int channel) { return group[channel]; },
            [&](int channel, float y) {
                const int at = base + channel;
                const float normed = fmaf(y, __ldg(weight + at), __ldg(bias + at));
                attended[x_index<R>(row, at)] = from_float<T>(normed * silu(to_float(gate[channel])));
            });
    }
    meet();
}

}  // namespace step
}  // namespace dijiang
