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
    __device__ __forceinline__ void copy(const BlockFacts& facts, int matrix, uint32_t formats) {
        const Layout& layout = p.layout;
        const Part part = facts.of[matrix];
        const uint8_t* from = matrix_begin + bytes_ahead(facts, part, matrix, formats);
        matrix_begin += matrix_bytes(layout, formats, matrix);
        bool eight = group_is_int8(layout, formats, matrix, 0);
#pragma unroll 1
        for (int group = 0, same, end = part.groups; group < part.groups; group += same) {  // groups of one format, of one batch
            if (matrix == kAttention) {
                int of = part_of(facts, group);
                eight = group_is_int8(layout, formats, matrix, of);
#pragma unroll 1
                for (end = facts.part_ends[of]; ++of < kParts; end = facts.part_ends[of])
                    if (facts.part_ends[of] > end && group_is_int8(layout, formats, matrix, of) != eight) break;
            }
            same = min(end - group, kBatch - group % kBatch);
            copy_rounds(from, same * units_of_group(part.chunks, eight), unit_bytes(eight));
        }
    }

private:
    const uint8_t* matrix_begin;

    // Bytes of a matrix that other blocks before this one have.
    __device__ __forceinline__ int64_t bytes_ahead(const BlockFacts& facts, const Part& part, int matrix, uint32_t formats) const {
        if (matrix != kAttention) return bytes_before(p.layout, formats, matrix, part.first);
        int eights = 0;
#pragma unroll 1
        for (int of = 0; of < kParts; ++of) eights += group_is_int8(p.layout, formats, matrix, of) ? facts.part_before[of] : 0;
        return attention_bytes(p.layout, part.first, eights);
    }

    __device__ __forceinline__ void copy_rounds(const uint8_t*& from, int units, int bytes_of_unit) {
#pragma unroll 1
        for (; units > 0; units -= kWarps) {
            wait_for_slot();
            wait_to_ask();
            const uint32_t bytes = min(units, kWarps) * bytes_of_unit;
            copy_piece(ring.bytes + slot * kRoundBytes, from, bytes, ring.full + slot, once);
            from += bytes;
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
        copier.copy(c.facts(), matrix, formats_of(layout, i / kOfLayer));
    }
}

// Of a batch's groups, bit i: that group i is int8. Where they differ, a lane asks for one of them.
__device__ __forceinline__ uint32_t int8_groups(const Params& p, const BlockFacts& facts, uint32_t formats, int matrix, int batch) {
    static_assert(kBatch <= 32, "a lane for each");
    if (matrix != kAttention) return (formats & p.int8_bits[matrix]) != 0 ? ~0u : 0u;
    const int part = part_of(facts, batch + static_cast<int>(threadIdx.x % 32));
    return __ballot_sync(~0u, group_is_int8(p.layout, formats, matrix, part));
}

// As product() of step/kernel.cuh, of whatever matrix.
template <bool kStay, typename Matrix, typename Parallel, typename T, int R, typename Take, typename Meanwhile>
__device__ __forceinline__ void quantised_product(Context<T, R>& c, Matrix matrix, Parallel parallel, uint32_t formats, Take take,
                                                  Meanwhile meanwhile) {
    const Params& p = c.p;
    const auto wait = [&] {
        // With parallel residual both products of the normalised rows are served at once.
        if (c.groups(matrix) <= 0 && !(matrix == kAttention && parallel && c.groups(kUp) > 0)) return;
        c.set_waiting(true);
        take();
        c.set_waiting(false);
    };
    const Part part = c.facts().of[matrix];
    QuantisedMultiplier<T, R, kStay> multiplier(c.at, part.chunks);
    const uint32_t thread = kept(threadIdx.x);
    const int mine = thread / (kGroup * R);  // this thread's first group of a batch
    const float* const biases = c.constant(p.biases[matrix]) + part.first * kGroup + thread % kGroup;
    const auto bias_of = [&](int group) { return matrix != kHead && group < part.groups ? __ldg(biases + group * kGroup) : 0.0f; };
    float bias = bias_of(mine);
    wait();
    uint32_t eights = int8_groups(p, c.facts(), formats, matrix, 0);
    const T* const x = c.template in_shared<T>(p.inputs[matrix]);
    float* const sums = c.template in_shared<float>(p.memory.sums) + thread / 32 * kSumsOfWarp<R>;
#pragma unroll 1
    for (int batch = 0;;) {
        const int groups = min(kBatch, part.groups - batch);
        if (groups > 0) multiplier.run(c.facts(), matrix, groups, eights, x, sums);
        if (batch == 0) meanwhile();
        if (groups <= 0) break;
        meet();
        finish_batch<true>(c, matrix, parallel, part.first + batch, groups, biases + batch * kGroup, bias);
        batch += kBatch;
        if (batch >= part.groups) break;
        bias = bias_of(batch + mine);
        eights = int8_groups(p, c.facts(), formats, matrix, batch);
        meet();
    }
}

// Do wide models have another walk (layout.h)? With compute capability 9.0, where it was timed; on others it would spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
constexpr bool kWalksDiffer = false;
#else
constexpr bool kWalksDiffer = true;
#endif

// Walks all layers and the head. kWide: constants stay in the weights, and attention has its loads under way at once.
template <bool kWide, typename T, int R> __device__ __forceinline__ void walk_quantised(Context<T, R>& c) {
    const Params& p = c.p;
    Attention<T, R> attention(c);
    const bool parallel = p.layout.parallel != 0;
    const int before_attention = parallel ? 1 : 0;  // the turn that attention follows
    int layer = 0, turn = 0;
    if constexpr (kWide) attention.prefetch_state(c, 0);
#pragma unroll 1
    for (;;) {
        const bool head = layer == p.layout.layers;
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
                const uint32_t tag = up ? c.tag : layer == 0 ? 0 : c.tag - 1;
                const int64_t norm = up ? p.places.mlp_norm : head ? 0 : p.places.attention_norm;
                take_normalised(c, tag, norm, parallel && !head);
            }
        };
        quantised_product<kWide>(c, matrix, parallel, formats_of(p.layout, layer), take, [&] {
            if (head || turn != 0) return;
            prefetch_constants(c, layer + 1);
            if constexpr (kWide) attention.prefetch_state(c, layer + 1);
        });
        if (head) return;
        if (turn == before_attention) {  // what it needs is not asked for earlier: there are no registers to keep it in
            Requests<R> asked;
            if constexpr (!kWide) {
                attention.request_state(c, asked, layer);
                attention.request_proj(c, asked);
            }
            attention.template run<kWide>(c, asked, layer);
        }
        if (++turn < kOfLayer) continue;
        turn = 0;
        ++layer;
        c.constants += p.places.size;
        c.tag += 2;
    }
}

template <typename T, int R, bool kWide>
__global__ void __launch_bounds__(kThreads + 32, 1) quantised_step_kernel(const __grid_constant__ Params p) {
#if !defined(__CUDA_ARCH__) || DIJIANG_STEP_HERE
    walk<QuantisedCut, T, R>(
        p, [](const Context<T, R>& c, const Ring<QuantisedCut>& ring) { copy_rounds(c, ring); },
        [](Context<T, R>& c) { walk_quantised<kWide && kWalksDiffer>(c); });
#else
    __trap();
#endif
}

}  // namespace step
}  // namespace dijiang
