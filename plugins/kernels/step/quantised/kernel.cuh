// A decoding step in one launch with int8 and int4 weights: the walk of step/kernel.cuh, one program for all matrices of a layer
// and either order of them. Its weights are so few bytes that the program is what takes the time: this one is short.
#pragma once

#include "step/kernel.cuh"
#include "step/quantised/product.cuh"

namespace dijiang {
namespace step {

// Copies a block's rounds. Whole matrices follow each other in memory, and in each its groups; a round is a piece.
class RoundCopier : Asker<QuantisedCut> {
public:
    __device__ __forceinline__ RoundCopier(const Params& params, const Ring<QuantisedCut>& to, uint32_t* waits)
        : Asker(params, to, waits), matrix_begin(params.packed) {}

    // The next matrix in the order of a step.
    __device__ __forceinline__ void copy(const Part& part, int matrix, uint32_t formats) {
        const Layout& layout = p.layout;
        const uint8_t* from = matrix_begin + bytes_before(layout, formats, matrix, part.first);
        matrix_begin += matrix_bytes(layout, formats, matrix);
        int stripe = matrix == kAttention ? stripe_of(p, part.first) : 0;
        bool eight = group_is_int8(layout, formats, matrix, stripe);
#pragma unroll 1
        for (int group = 0, same; group < part.groups; group += same) {  // groups of one format, of one batch
            const int most = min(part.groups - group, kBatch - group % kBatch);
            bool next = eight;
            if (matrix != kAttention) {
                same = most;
            } else {
#pragma unroll 1
                for (same = 0; same < most && next == eight; ++same) {
                    if (++stripe == layout.stripes) stripe = 0;
                    next = group_is_int8(layout, formats, matrix, stripe);
                }
            }
            copy_rounds(from, same * units_of_group(part.chunks, eight), unit_bytes(eight));
            eight = next;
        }
    }

private:
    const uint8_t* matrix_begin;

    __device__ __forceinline__ void copy_rounds(const uint8_t*& from, int units, int bytes_of_unit) {
#pragma unroll 1
        for (; units > 0; units -= kWarps) {
            wait_for_slot();
#pragma unroll 1
            for (int piece = 0, left = min(units, kWarps); piece < kRoundPieces; ++piece, left -= kPieceWarps) {
                uint64_t* const full = ring.full + slot * kRoundPieces + piece;
                wait_to_ask();
                if (left <= 0) {
                    mbarrier_arrive(full);
                    continue;
                }
                const uint32_t bytes = min(left, kPieceWarps) * bytes_of_unit;
                copy_piece(ring.bytes + slot * kRoundBytes + piece * kPieceWarps * bytes_of_unit, from, bytes, full, once);
                from += bytes;
            }
            next_slot();
        }
    }
};

template <typename T, int R> __device__ __forceinline__ void copy_rounds(const Context<T, R>& c, const Ring<QuantisedCut>& ring) {
    RoundCopier copier(c.p, ring, &const_cast<BlockFacts&>(c.facts()).waiting);
    const Layout& layout = c.p.layout;
    const int all = layout.layers * kOfLayer;
#pragma unroll 1
    for (int i = 0; i <= all; ++i) {
        const int matrix = i == all ? static_cast<int>(kHead) : layout.at(i % kOfLayer);
        copier.copy(c.facts().of[matrix], matrix, formats_of(layout, i / kOfLayer));
    }
}

// Of a batch's groups, bit i: that group i is int8. Where they differ, a lane asks for one of them.
__device__ __forceinline__ uint32_t int8_groups(const Params& p, uint32_t formats, int matrix, int first) {
    static_assert(kBatch <= 32, "a lane for each");
    if (matrix != kAttention) return (formats & p.int8_bits[matrix]) != 0 ? ~0u : 0u;
    const int stripe = stripe_of(p, first + static_cast<int>(threadIdx.x % 32));
    return __ballot_sync(~0u, group_is_int8(p.layout, formats, matrix, stripe));
}

// Has the biases of this block's rows in a layer brought to shared memory, from its constants. In registers they would be
// waited for behind whatever branch comes next, and so long before they are needed.
template <typename T, int R> __device__ __forceinline__ void request_biases(const Context<T, R>& c, int layer, const uint8_t* constants) {
    const BlockFacts& facts = c.facts();
    if (layer >= c.p.layout.layers) return;
    const int of[] = {0, facts.bias_at[kUp], facts.bias_at[kDown], facts.bias_at[kDense]}, total = facts.bias_at[kHead];
    float* const to = c.biases_of(layer);
#pragma unroll 1
    for (int i = kept(threadIdx.x); i < total; i += kThreads) {
        const int matrix = (i >= of[kUp]) + (i >= of[kDown]) + (i >= of[kDense]);
        const int within = i - facts.bias_at[matrix] + facts.of[matrix].first * kGroup;
        copy_word(to + i, reinterpret_cast<const float*>(constants + c.p.biases[matrix]) + within);
    }
}

// As product() of step/kernel.cuh, of whatever matrix.
template <typename Matrix, typename Parallel, typename T, int R, typename Take, typename Meanwhile>
__device__ __forceinline__ void quantised_product(Context<T, R>& c, Matrix matrix, Parallel parallel, uint32_t formats, Take take,
                                                  Meanwhile meanwhile) {
    const Params& p = c.p;
    const auto wait = [&] {
        // With parallel residual both products of the normalised rows are served at once.
        if (c.groups(matrix) <= 0 && !(matrix == kAttention && parallel && c.groups(kUp) > 0)) {
            if (matrix == kAttention) meet();  // or biases would be written that are being read
            return;
        }
        c.set_waiting(true);
        take();
        c.set_waiting(false);
    };
    const Part part = c.facts().of[matrix];
    QuantisedMultiplier<T, R> multiplier(c.at, part.chunks);
    const float* const biases = c.biases_of(c.layer) + c.facts().bias_at[matrix];
    wait();
    const T* const x = c.template in_shared<T>(p.inputs[matrix]);
    float* const sums = c.template in_shared<float>(p.memory.sums) + kept(threadIdx.x) / 32 * kSumsOfWarp<R>;
#pragma unroll 1
    for (int batch = 0;;) {
        const int groups = min(kBatch, part.groups - batch);
        if (groups > 0) multiplier.run(c.facts(), matrix, groups, int8_groups(p, formats, matrix, part.first + batch), x, sums);
        if (batch == 0) meanwhile();
        if (groups <= 0) break;
        meet();
        finish_batch<true>(c, matrix, parallel, part.first + batch, groups, biases + batch * kGroup, 0.0f);
        batch += kBatch;
        if (batch >= part.groups) break;
        meet();
    }
}

// Walks all layers and the head.
template <typename T, int R> __device__ __forceinline__ void walk_quantised(Context<T, R>& c) {
    const Params& p = c.p;
    Attention<T, R> attention(c);
    const bool parallel = p.layout.parallel != 0;
    const int before_attention = parallel ? 1 : 0;  // the turn that attention follows
    int turn = 0;
    request_biases(c, 0, c.constants);
#pragma unroll 1
    for (;;) {
        const bool head = c.layer == p.layout.layers;
        const int matrix = head ? static_cast<int>(kHead) : p.layout.at(turn);
        const auto take = [&] {
            if (matrix == kDown) {
                take_inner(c);
            } else if (matrix == kDense) {
                take_outputs(c);
            } else if (matrix == kUp && parallel) {
                meet();  // q, k, v and gate have been added up
            } else {
                const bool up = matrix == kUp;
                const uint32_t tag = up ? c.tag : c.layer == 0 ? 0 : c.tag - 1;
                const int64_t norm = up ? p.places.mlp_norm : head ? 0 : p.places.attention_norm;
                take_normalised(c, tag, norm, parallel && !head);
            }
        };
        if (turn == 0) words_copied();  // biases: all see them behind the next meet()
        quantised_product(c, matrix, parallel, formats_of(p.layout, c.layer), take, [&] {
            if (head || turn > 0) return;
            prefetch_constants(c, c.layer + 1);
            request_biases(c, c.layer + 1, c.constants + p.places.size);
        });
        if (head) return;
        if (turn == before_attention) {  // what it needs is not asked for earlier: there are no registers to keep it in
            Requests<R> asked;
            attention.request_state(c, asked, c.layer);
            attention.request_proj(c, asked);
            attention.run(c, asked, c.layer);
        }
        if (++turn < kOfLayer) continue;
        turn = 0;
        ++c.layer;
        c.constants += p.places.size;
        c.tag += 2;
    }
}

template <typename T, int R>
__global__ void __launch_bounds__(kThreads + 32, 1) quantised_step_kernel(const __grid_constant__ Params p) {
#if !defined(__CUDA_ARCH__) || DIJIANG_STEP_HERE
    walk<QuantisedCut, T, R>(
        p, [](const Context<T, R>& c, const Ring<QuantisedCut>& ring) { copy_rounds(c, ring); },
        [](Context<T, R>& c) { walk_quantised(c); });
#else
    __trap();
#endif
}

}  // namespace step
}  // namespace dijiang
