// Quantised products of few rows: a set of warps computes 8 output elements for all rows of a block, then the next.
//
// A chunk of weights comes into a ring in shared memory, 16 bytes a lane and its scales by the first lanes, is
// widened in registers, exactly, and multiplied block by block; a block's sums, float32, are scaled when they are
// added to the others. Nothing is lost by rows that are not there: memory takes the time.
#pragma once

#include "device/activation.cuh"
#include "device/copies.cuh"
#include "device/elements.cuh"
#include "device/math.cuh"
#include "device/mma.cuh"
#include "device/overlap.cuh"
#include "linear/input.cuh"
#include "linear/quantized/weights.cuh"

namespace dijiang {
namespace quantized {

using linear::Affine;
using linear::normalize;

// The inputs of this block's rows, side by side if there are two, each with zeros up to a whole chunk.
template <typename T>
__device__ void stage(const dijiang_linear_term* terms, const Term* cuts, int count, int first_row, int rows,
                      int pitch, T* to) {
    for (int t = 0; t < count; ++t) {
        const int inner = terms[t].inner, padded = cuts[t].chunks * chunk_elements(cuts[t].format);
        const T* from = static_cast<const T*>(terms[t].input) + int64_t{first_row} * inner;
        for (int row = 0; row < rows; ++row, from += inner)
#pragma unroll 2
            for (int x = 8 * threadIdx.x; x < padded; x += 8 * blockDim.x)
                *reinterpret_cast<uint4*>(to + row * pitch + x) =
                    x < inner ? __ldcg(reinterpret_cast<const uint4*>(from + x)) : uint4{0, 0, 0, 0};
        to += padded;
    }
}

// One chunk's products with the staged rows. input: the address that this lane gives ldmatrix.
//
// Of up to 8 rows the mma's other 8 take what else the same registers hold: with the four pairs of row g as A, its row
// g has pairs 0 and 2, for which B has the weights in one mma, and its row g + 8 has pairs 1 and 3, for which B has
// them in another. So one ldmatrix is A as it is, twice.
template <typename T, int kFormat, bool kSixteen>
__device__ __forceinline__ void multiply_chunk(const uint4& weights, const unsigned char* scales, uint32_t input,
                                               float (&sums)[4]) {
    constexpr int kBlocks = kFormat == DIJIANG_INT4 ? 4 : 2;
    uint32_t pairs_of_scales[kBlocks];
    if constexpr (kBlocks == 4)
        *reinterpret_cast<uint4*>(pairs_of_scales) = *reinterpret_cast<const uint4*>(scales);
    else
        *reinterpret_cast<uint2*>(pairs_of_scales) = *reinterpret_cast<const uint2*>(scales);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
        uint32_t x[4], pairs[4];
        ldmatrix(x, input + 2 * b * kBlock);
        widen<T, kFormat>(weights, b, pairs);
        const float2 scale = unpack<__half>(pairs_of_scales[b]);
        float one[4] = {}, other[4] = {};
        if constexpr (kSixteen) {
            uint32_t y[4];
            ldmatrix(y, input + 2 * b * kBlock + kBlock);
            mma<T>(one, x, pairs[0], pairs[1]);
            mma<T>(one, y, pairs[2], pairs[3]);
            sums[0] = fmaf(scale.x, one[0], sums[0]);
            sums[1] = fmaf(scale.y, one[1], sums[1]);
            sums[2] = fmaf(scale.x, one[2], sums[2]);
            sums[3] = fmaf(scale.y, one[3], sums[3]);
        } else {
            mma<T>(one, x, pairs[0], pairs[2]);
            mma<T>(other, x, pairs[1], pairs[3]);
            sums[0] = fmaf(scale.x, one[0] + other[2], sums[0]);
            sums[1] = fmaf(scale.y, one[1] + other[3], sums[1]);
        }
    }
}

// What a warp requests next: its chunks of a tile, every `sharing`-th from `part` on, then those of its next tile.
struct Walk {
    const unsigned char* from;  // of the chunk, plus this lane's 16 bytes
    const unsigned char *first, *second;
    int tile, next, limit;      // limit: the first chunk that the current term does not have
    int first_chunks, chunks, part, sharing, stride;
    int first_bytes, second_bytes;  // of a chunk of each term
    int step;                       // bytes from one request to the next within a term

    __device__ void locate() {
        const bool start = next < first_chunks;
        const int at = start ? next : next - first_chunks, of = start ? first_chunks : chunks - first_chunks;
        const int bytes = start ? first_bytes : second_bytes;
        from = (start ? first : second) + (int64_t{tile} * of + at) * bytes;
        limit = start ? first_chunks : chunks;
        step = sharing * bytes;
    }
    __device__ void advance() {
        next += sharing;
        from += step;
        if (next < limit) return;
        if (next >= chunks) {
            next = part;
            tile += stride;
        }
        locate();
    }
};

template <typename T, bool kSixteen>
__device__ void compute(const Params& p, unsigned char* shared) {
    constexpr int kSums = kSixteen ? 4 : 2;  // of a thread, that count
    let_next_kernel_start();
    int o = p.call.output_count - 1;
    while (o > 0 && static_cast<int>(blockIdx.x) < p.outputs[o].first_block) --o;
    const OutputCut& cut = p.outputs[o];
    const dijiang_linear_output& out = p.call.outputs[o];
    const dijiang_linear_term* const terms = p.call.terms + cut.term;
    const Term* const cuts = p.terms + cut.term;
    const int threads = blockDim.x, width = out.width, inner = terms[0].inner;
    const bool constant = p.call.constant_weights != 0;

    Affine affine;
    if (constant) affine.load(out, inner, 8 * threadIdx.x);

    const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4, warp = threadIdx.x / 32;
    const int sharing = p.warps_per_tile, set = warp / sharing, part = warp - set * sharing;
    const int stride = cut.blocks * p.tiles_per_block;
    const int first_tile = (blockIdx.x - cut.first_block) * p.tiles_per_block + set;
    const int tiles = set < p.tiles_per_block ? (width + kTile - 1) / kTile : 0;
    const int first_chunks = cuts[0].chunks, chunks = first_chunks + (cut.terms > 1 ? cuts[1].chunks : 0);
    const int first_format = cuts[0].format, second_format = cut.terms > 1 ? cuts[1].format : first_format;

    unsigned char* const ring = shared + warp * (kAhead * kSlot);
    Walk walk;
    walk.first = static_cast<const unsigned char*>(terms[0].weight) + 16 * lane;
    walk.second = cut.terms > 1 ? static_cast<const unsigned char*>(terms[1].weight) + 16 * lane : nullptr;
    walk.first_bytes = chunk_bytes(first_format), walk.second_bytes = chunk_bytes(second_format);
    walk.tile = first_tile, walk.next = part, walk.stride = stride;
    walk.first_chunks = first_chunks, walk.chunks = chunks, walk.part = part, walk.sharing = sharing;
    walk.locate();
    if (part >= chunks) walk.tile = tiles;  // more warps than chunks
    int next_slot = 0;
    const auto request = [&] {
        if (walk.tile < tiles) {
            const uint32_t to = shared_address(ring + next_slot * kSlot) + 16 * lane;
            copy_async(to, walk.from, true);
            // The scales' 32 or 64 bytes, by the first lanes.
            const int scale_lanes = (walk.next >= first_chunks ? second_format : first_format) == DIJIANG_INT4 ? 4 : 2;
            if (lane < scale_lanes) copy_async(to + kLoad, walk.from + kLoad, true);
            walk.advance();
        }
        commit_copies();  // an empty group counts as well
        next_slot = next_slot + 1 == kAhead ? 0 : next_slot + 1;
    };
    const auto fill = [&] {
#pragma unroll 1
        for (int slot = 0; slot < kAhead - 1; ++slot) request();
    };
    if (constant) fill();
    wait_for_previous_kernel();
    if (!constant) {
        affine.load(out, inner, 8 * threadIdx.x);
        fill();
    }

    const int first_row = blockIdx.y * p.rows_per_block, rows = min(p.rows_per_block, p.call.rows - first_row);
    const int pitch = staged_pitch(cut.staged);
    T* const staged = reinterpret_cast<T*>(shared + p.staged_offset);
    // Of two terms with one input, that whose chunks reach further.
    const int further = cut.shared_input && chunk_elements(second_format) > chunk_elements(first_format) ? 1 : 0;
    stage(terms, cuts + further, cut.shared_input ? 1 : cut.terms, first_row, rows, pitch, staged);
    __syncthreads();
    if (out.norm != DIJIANG_NORM_NONE) {
        normalize(out, inner, rows, pitch, affine, staged, reinterpret_cast<float2*>(shared + p.sums_offset));
        __syncthreads();
    }

    const bool gated = out.activation == DIJIANG_SWIGLU;
    // Rows that are not there count as the last one, and what they make is thrown away.
    const int my_row = kSixteen ? lane % 16 : lane % 8, my_column = kSixteen ? lane / 16 * 8 : lane / 8 * 8;
    const uint32_t mine = shared_address(staged + min(my_row, rows - 1) * pitch + my_column);
    const int second_at = cut.shared_input ? 0 : first_chunks * chunk_elements(first_format);
    const int sums_size = kSums * (p.any_gated ? 2 : 1) * threads;
    float* met = reinterpret_cast<float*>(shared + p.sums_offset) + threadIdx.x;
    int slot = 0;
    for (int tile = first_tile, round = 0; round < cut.rounds; ++round, tile += stride) {
        const bool working = tile < tiles;
        const bool finishing = working && part == 0;
        // What the first warp of the set needs at the end of the tile.
        float added[kSums], second_bias[2] = {0.0f, 0.0f}, first_bias[2] = {0.0f, 0.0f};
        if (finishing) {
#pragma unroll
            for (int s = 0; s < kSums; ++s) {
                const int row = g + s / 2 * 8, column = tile * kTile + 2 * c + s % 2;
                added[s] = 0.0f;
                if (row < rows && column < width) {
                    if (out.residual != nullptr)
                        added[s] = to_float(
                            static_cast<const T*>(out.residual)[int64_t{first_row + row} * width + column]);
                    if (terms[0].bias != nullptr) first_bias[s % 2] = __ldg(terms[0].bias + column);
                    if (cut.terms > 1 && terms[1].bias != nullptr) second_bias[s % 2] = __ldg(terms[1].bias + column);
                }
            }
        }

        // With two terms that are multiplied, the first's sums are set aside.
        float sums[4] = {}, firsts[4] = {};
        const auto multiply = [&](int format, int column) {
            wait_copies<kAhead - 2>();
            __syncwarp();  // all lanes have their part of this slot, and have read the one before it
            const unsigned char* const here = ring + slot * kSlot;
            const uint4 weights = *reinterpret_cast<const uint4*>(here + 16 * lane);
            request();
            slot = slot + 1 == kAhead ? 0 : slot + 1;
            if (format == DIJIANG_INT4)
                multiply_chunk<T, DIJIANG_INT4, kSixteen>(weights, here + kLoad + 16 * c, mine + 2 * column, sums);
            else
                multiply_chunk<T, DIJIANG_INT8, kSixteen>(weights, here + kLoad + 8 * c, mine + 2 * column, sums);
        };
        int i = working ? part : chunks;
        for (; i < first_chunks; i += sharing) multiply(first_format, i * chunk_elements(first_format));
        if (gated) {
#pragma unroll
            for (int s = 0; s < kSums; ++s) firsts[s] = sums[s], sums[s] = 0.0f;
        }
        for (; i < chunks; i += sharing)
            multiply(second_format, second_at + (i - first_chunks) * chunk_elements(second_format));

        // The warps' sums meet in shared memory, where two tiles have room; the first warp of the set adds
        // them up in their order.
        float* const here = met + (round % 2) * sums_size;
#pragma unroll
        for (int s = 0; s < kSums; ++s) {
            here[s * threads] = gated ? firsts[s] : sums[s];
            if (gated) here[(kSums + s) * threads] = sums[s];
        }
        __syncthreads();
        if (!finishing) continue;
#pragma unroll
        for (int s = 0; s < kSums; ++s) {
            const int row = g + s / 2 * 8, column = tile * kTile + 2 * c + s % 2;
            if (row >= rows || column >= width) continue;
            float x = first_bias[s % 2], second = second_bias[s % 2];
            if (!gated) x += second;
            for (int w = 0; w < sharing; ++w) {
                x += here[s * threads + 32 * w];
                if (gated) second += here[(kSums + s) * threads + 32 * w];
            }
            x = activate(out.activation, x, second) + added[s];
            static_cast<T*>(out.output)[int64_t{first_row + row} * width + column] = from_float<T>(x);
        }
    }
    wait_copies<0>();
}

template <typename T, bool kSixteen>
__global__ void __launch_bounds__(kMostThreads, 1) few_kernel(const __grid_constant__ Params p) {
    extern __shared__ uint4 shared[];
    compute<T, kSixteen>(p, reinterpret_cast<unsigned char*>(shared));
}

}  // namespace quantized
}  // namespace dijiang
