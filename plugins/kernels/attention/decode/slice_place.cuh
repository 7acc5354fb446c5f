// Where a block of the slice kernel is: its shared memory, its threads' rows and columns, its items and their states.
#pragma once

#include "attention/decode/cut.h"
#include "attention/decode/slice_shape.cuh"
#include "device/cluster.cuh"
#include "device/copies.cuh"

namespace dijiang {
namespace decode {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// A block's shared memory, beside the next item's state.
template <typename S> struct SliceMemory {
    float2 (&logits)[2][S::D];  // (q, k); two sets, for this item and the next
    float2 (&features)[S::D];   // each warp's own rows, not yet divided by their sums
    float2 (&logit_parts)[S::kWarps][S::W];
    float (&output_parts)[S::kWarps][S::W];
    float (&raw)[2][S::kMostClusterChannels];
    float (&values)[2][S::W];   // v
    float2 (&affine)[2][S::W];  // (weight, bias) of GroupNorm times the gate
    uint64_t (&logits_there)[2];
    uint64_t (&raw_there)[2];

    __device__ __forceinline__ void open() const {
        if (threadIdx.x == 0) {
            for (int i = 0; i < 2; ++i) {
                make_arrival(&logits_there[i]);
                make_arrival(&raw_there[i]);
            }
            publish_arrivals();
        }
    }
    // What other blocks will send for an item.
    __device__ __forceinline__ void expect(const SliceCut& cut, int blocks, uint32_t buffer) const {
        if (threadIdx.x == 0) {
            if (S::kExchange) expect_arrival(&logits_there[buffer], S::D * sizeof(float2));
            if (cut.norm == Norm::cluster) expect_arrival(&raw_there[buffer], blocks * S::W * sizeof(float));
        }
    }
};

// This thread in its block: a warp owns kRows rows of P, of the features and of the state, a lane four columns of
// every kSubs-th of them.
template <typename S> struct SliceThread {
    int lane, warp, quad, sub;
    int rank, blocks;       // the block's in its cluster, and how many that has
    int split, first_peer;  // the block's among those of its head, and the first of those in the cluster
    int first_row;          // the warp's

    explicit __device__ __forceinline__ SliceThread(const SliceCut& cut)
        : lane(threadIdx.x % 32), warp(threadIdx.x / 32), quad(lane % S::kQuads), sub(lane / S::kQuads),
          rank(cluster_block()), blocks(cut.heads * S::kSplits), split(rank % S::kSplits),
          first_peer(rank - split), first_row(warp * S::kRows) {}

    // Has this lane a row in that step?
    __device__ __forceinline__ bool holds(int step) const {
        return S::kFull || (sub < S::kSubs && sub + step * S::kSubs < S::kRows);
    }
    // This thread's first entry of a head's [D, D].
    __device__ __forceinline__ uint32_t first_entry() const {
        return (first_row + sub) * S::D + split * S::W + 4 * quad;
    }
    // The element of q that this lane turns, and of k, in further lanes or in a second element.
    __device__ __forceinline__ int turned_row() const {
        return first_row + (S::kTurned == 1 ? lane % S::kRows : min(lane, S::kRows - 1));
    }
};

// A block's part of an item.
struct Item {
    int row, head;
};

// Items are numbered row * items_per_row + unit, a unit being `heads` heads; a cluster has every stride-th of them.
struct ItemWalk {
    int stride, row_stride, head_stride;

    __device__ __forceinline__ ItemWalk(const AttentionParams& p, const SliceCut& cut)
        : stride(cluster_count()), row_stride(cut.items_per_row.quotient(stride)),
          head_stride(stride * cut.heads - row_stride * p.num_heads) {}

    template <typename S>
    static __device__ __forceinline__ Item first(const AttentionParams& p, const SliceCut& cut,
                                                 const SliceThread<S>& at, int number) {
        const int row = cut.items_per_row.quotient(number);
        return {row, number * cut.heads - row * p.num_heads + at.rank / S::kSplits};
    }
    __device__ __forceinline__ void step_on(const AttentionParams& p, Item& item) const {
        item.row += row_stride;
        item.head += head_stride;
        if (item.head >= p.num_heads) {
            item.head -= p.num_heads;
            ++item.row;
        }
    }
};

// This thread's entries of an item's state, in places of its own. The next item's are requested piece by piece as
// these are used up.
template <typename S> struct SliceState {
    int number;  // of the item whose state is requested next,
    Item item;
    const float* from;  // and where this thread's entries of it are
    float4* slot;

    __device__ __forceinline__ SliceState(float4* mine, int first_number, const Item& first)
        : number(first_number), item(first), from(nullptr), slot(mine) {}

    __device__ __forceinline__ void aim(const AttentionParams& p, uint32_t first_entry) {
        from = p.past_state + item.row * p.past_batch_stride + static_cast<int64_t>(item.head) * (S::D * S::D) +
               first_entry;
    }
    __device__ __forceinline__ void request(const SliceCut& cut, const SliceThread<S>& at, int j) const {
        if (number < cut.items && at.holds(j)) {
            copy_async_256(slot + j * S::kThreads, from + j * S::kSubs * S::D);
        }
    }
    __device__ __forceinline__ void requested(const AttentionParams& p, const ItemWalk& walk) {
        commit_copies();
        number += walk.stride;
        walk.step_on(p, item);
    }
    // The first item's.
    __device__ __forceinline__ void fill(const AttentionParams& p, const SliceCut& cut, const SliceThread<S>& at,
                                         const ItemWalk& walk, uint32_t first_entry) {
        aim(p, first_entry);
#pragma unroll
        for (int j = 0; j < S::kSteps; ++j) request(cut, at, j);
        requested(p, walk);
    }
    // A row without a token: its state goes over as it is.
    __device__ __forceinline__ void pass(const AttentionParams& p, const SliceCut& cut, const SliceThread<S>& at,
                                         float* present) const {
        wait_copies<0>();
#pragma unroll 2
        for (int j = 0; j < S::kSteps; ++j) {
            if (p.present_state != p.past_state && at.holds(j)) {
                __stcg(reinterpret_cast<float4*>(present + j * S::kSubs * S::D), slot[j * S::kThreads]);
            }
            request(cut, at, j);
        }
    }
    // S' = fade S + k v and o = q S' on this thread's entries, (q, k) being the features of a row.
    __device__ __forceinline__ void update(const SliceCut& cut, const SliceThread<S>& at, const float2* features,
                                           float fade, const float4& v, float* present, float (&o)[4]) const {
        wait_copies<0>();
#pragma unroll(S::kSteps < 8 ? S::kSteps : 8)
        for (int j = 0; j < S::kSteps; ++j) {
            if (at.holds(j)) {
                const float2 x = features[at.first_row + at.sub + j * S::kSubs];
                const float q = x.x, k = x.y;
                float4 s = slot[j * S::kThreads];
                s.x = fmaf(fade, s.x, k * v.x);
                s.y = fmaf(fade, s.y, k * v.y);
                s.z = fmaf(fade, s.z, k * v.z);
                s.w = fmaf(fade, s.w, k * v.w);
                __stcg(reinterpret_cast<float4*>(present + j * S::kSubs * S::D), s);
                o[0] = fmaf(q, s.x, o[0]);
                o[1] = fmaf(q, s.y, o[1]);
                o[2] = fmaf(q, s.z, o[2]);
                o[3] = fmaf(q, s.w, o[3]);
                request(cut, at, j);
            }
        }
    }
};

#endif

}  // namespace decode
}  // namespace dijiang
