// Products of few rows: a set of warps computes 8 output elements for all rows of a block, then the next 8.
//
// A weight is read once, 16 bytes at a time, as an m16n8k16 takes B: thread (g, c) of a warp copies K elements 8 c
// to 8 c + 7 of a chunk of 32, of output element g, into a ring in shared memory that only it reads again. The mma
// wants others, namely 2 c, 2 c + 1, 2 c + 8 and 2 c + 9 of two chunks of 16; but a sum has no order, so the
// input's elements are taken the same way. Nothing is lost by rows that are not there: memory takes the time.
//
// The weights do not depend on the kernel before: with constant_weights the ring is filled while that one still
// runs, and it goes on being filled from one tile to the next.
#pragma once

#include "device/activation.cuh"
#include "device/copies.cuh"
#include "device/elements.cuh"
#include "device/math.cuh"
#include "device/mma.cuh"
#include "device/overlap.cuh"
#include "host/launch.h"
#include "linear/input.cuh"

namespace dijiang {
namespace linear {

template <typename T, bool kSixteen>
__device__ void compute(const Params& p, unsigned char* shared) {
    constexpr int kSums = kSixteen ? 4 : 2;  // of a thread, that count
    let_next_kernel_start();
    int o = p.call.output_count - 1;
    while (o > 0 && static_cast<int>(blockIdx.x) < p.outputs[o].first_block) --o;
    const OutputCut& cut = p.outputs[o];
    const dijiang_linear_output& out = p.call.outputs[o];
    const dijiang_linear_term* const terms = p.call.terms + cut.term;
    const int threads = blockDim.x, width = out.width, inner = terms[0].inner;
    const bool constant = p.call.constant_weights != 0;

    Affine affine;
    if (constant) affine.load(out, inner, 8 * threadIdx.x);

    // This warp's share: every `sharing`-th chunk of K of every `stride`-th tile.
    const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4, warp = threadIdx.x / 32;
    const int sharing = cut.warps_per_tile, set = warp / sharing, part = warp - set * sharing;
    const int stride = cut.blocks * cut.tiles_per_block;
    const int first_tile = (blockIdx.x - cut.first_block) * cut.tiles_per_block + set;
    const int tiles = set < cut.tiles_per_block ? (width + kTile - 1) / kTile : 0;
    const int first_chunks = inner / kChunk;
    const int chunks = first_chunks + (cut.terms > 1 ? terms[1].inner / kChunk : 0);

    // What is requested next, and where it goes. Output elements beyond the last count as the last one, and
    // are thrown away.
    uint4* const ring = reinterpret_cast<uint4*>(shared) + threadIdx.x;
    const T* const first_weights = static_cast<const T*>(terms[0].weight) + 8 * c;
    const T* const second_weights = cut.terms > 1 ? static_cast<const T*>(terms[1].weight) + 8 * c : nullptr;
    int next_tile = first_tile, next = part, next_slot = 0;
    const auto request = [&] {
        if (next_tile < tiles) {
            const int64_t element = min(next_tile * kTile + g, width - 1);
            const T* const from = next < first_chunks
                                      ? first_weights + element * inner + next * kChunk
                                      : second_weights + element * terms[1].inner + (next - first_chunks) * kChunk;
            copy_async(shared_address(ring + next_slot * threads), from, true);
            next += sharing;
            if (next >= chunks) {
                next = part;
                next_tile += stride;
            }
        }
        commit_copies();  // an empty group counts as well
        next_slot = next_slot + 1 == kAhead ? 0 : next_slot + 1;
    };
    const auto fill = [&] {
        for (int slot = 0; slot < kAhead; ++slot) request();
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
    stage(terms, cut.shared_input ? 1 : cut.terms, first_row, rows, pitch, staged);
    __syncthreads();
    if (out.norm != DIJIANG_NORM_NONE) {
        normalize(out, inner, rows, pitch, affine, staged, reinterpret_cast<float2*>(shared + p.sums_offset));
        __syncthreads();
    }

    const bool gated = out.activation == DIJIANG_SWIGLU;
    const T* const mine = staged + g * pitch + 8 * c;
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

        float sums[4] = {}, seconds[4] = {};
        for (int i = working ? part : chunks; i < chunks; i += sharing) {
            wait_copies<kAhead - 1>();
            const uint4 weights = ring[slot * threads];
            request();
            slot = slot + 1 == kAhead ? 0 : slot + 1;
            const int at = (i >= first_chunks && cut.shared_input ? i - first_chunks : i) * kChunk;
            uint4 low = {0, 0, 0, 0}, high = {0, 0, 0, 0};
            if (g < rows) low = *reinterpret_cast<const uint4*>(mine + at);
            if (kSixteen && g + 8 < rows) high = *reinterpret_cast<const uint4*>(mine + 8 * pitch + at);
            const uint32_t even[4] = {low.x, high.x, low.y, high.y}, odd[4] = {low.z, high.z, low.w, high.w};
            if (gated && i >= first_chunks) {
                mma<T>(seconds, even, weights.x, weights.y);
                mma<T>(seconds, odd, weights.z, weights.w);
            } else {
                mma<T>(sums, even, weights.x, weights.y);
                mma<T>(sums, odd, weights.z, weights.w);
            }
        }

        // The warps' sums meet in shared memory, where two tiles have room; the first warp of the set adds
        // them up in their order.
        float* const here = met + (round % 2) * sums_size;
#pragma unroll
        for (int s = 0; s < kSums; ++s) {
            here[s * threads] = sums[s];
            if (gated) here[(kSums + s) * threads] = seconds[s];
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
__global__ void __launch_bounds__(kMostThreads, 2) linear_kernel(const __grid_constant__ Params p) {
    extern __shared__ uint4 shared[];
    compute<T, kSixteen>(p, reinterpret_cast<unsigned char*>(shared));
}

template <typename T> cudaError_t launch(const Launch& launch, bool overlap, cudaStream_t stream) {
    void (*const kernel)(Params) =
        launch.params.rows_per_block > 8 ? linear_kernel<T, true> : linear_kernel<T, false>;
    const dim3 grid(static_cast<unsigned>(launch.blocks), static_cast<unsigned>(launch.row_blocks));
    const LaunchShape shape = {grid, launch.threads, static_cast<size_t>(launch.shared_memory), 1, overlap};
    return launch_kernel(kernel, shape, stream, launch.params);
}

}  // namespace linear
}  // namespace dijiang
