// Quantised products of many rows: tiles of 128 or 64 rows by 128 weight rows, of which four warps have a quarter each.
//
// A chunk's inputs and weights come into shared memory, two chunks in turn; weights are widened in registers, exactly,
// and a block's sums, float32, are scaled when they are added to the others. With DIJIANG_SWIGLU half of a tile's
// weight rows are the second term's, for the same output elements.
#pragma once

#include "device/copies.cuh"
#include "device/elements.cuh"
#include "device/mma.cuh"
#include "device/overlap.cuh"
#include "linear/activations.cuh"
#include "linear/quantized/weights.cuh"

namespace dijiang {
namespace quantized {

// Where 16 bytes of a row lie, in units of 16 bytes: two neighbouring rows in different halves of the banks.
__device__ __forceinline__ int swizzled(int row, int unit, int units) { return row * units + (unit ^ (row % 2 * 4)); }

// kSlices: of 16 rows each, that a warp has.
template <typename T, int kSlices> struct Tile {
    float sums[kSlices][8][4];  // by 16 rows, by 8 weight rows

    __device__ Tile() {
#pragma unroll
        for (int i = 0; i < kSlices; ++i)
#pragma unroll
            for (int j = 0; j < 8; ++j)
#pragma unroll
                for (int s = 0; s < 4; ++s) sums[i][j][s] = 0.0f;
    }

    template <int kFormat> __device__ __forceinline__ void multiply(const unsigned char* input, const unsigned char* weights) {
        constexpr int kBlocks = kFormat == DIJIANG_INT4 ? 4 : 2, kUnits = chunk_elements(kFormat) / 8;
        const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4, warp = threadIdx.x / 32;
        const uint4* const rows = reinterpret_cast<const uint4*>(input) + (warp / 2 * (16 * kSlices) + g) * kUnits;
        const unsigned char* const mine = weights + warp % 2 * (8 * kSlot);
#pragma unroll 1
        for (int b = 0; b < kBlocks; ++b) {
            uint4 low[kSlices], high[kSlices];
            const int unit = (4 * b + c) ^ (g % 2 * 4);
#pragma unroll
            for (int i = 0; i < kSlices; ++i) {
                low[i] = rows[16 * i * kUnits + unit];
                high[i] = rows[(16 * i + 8) * kUnits + unit];
            }
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                uint32_t pairs[4];
                if constexpr (kFormat == DIJIANG_INT4) {
                    widen4<T>(*reinterpret_cast<const uint32_t*>(mine + j * kSlot + 16 * lane + 4 * b), pairs);
                } else {
                    const uint2 two = *reinterpret_cast<const uint2*>(mine + j * kSlot + 16 * lane + 8 * b);
                    widen8<T>(two.x, two.y, pairs);
                }
#ifdef DIJIANG_ROUNDED  // a trial: weights rounded to T
                const __half scale = *reinterpret_cast<const __half*>(mine + j * kSlot + kLoad + 4 * kBlocks * (g / 2) +
                                                                      4 * b + 2 * (g % 2));
                const uint32_t both = pack<T>(__half2float(scale), __half2float(scale));
#pragma unroll
                for (int k = 0; k < 4; ++k) pairs[k] = dijiang::multiply<T>(pairs[k], both);
#pragma unroll
                for (int i = 0; i < kSlices; ++i) {
                    const uint32_t even[4] = {low[i].x, high[i].x, low[i].y, high[i].y};
                    const uint32_t odd[4] = {low[i].z, high[i].z, low[i].w, high[i].w};
                    mma<T>(sums[i][j], even, pairs[0], pairs[1]);
                    mma<T>(sums[i][j], odd, pairs[2], pairs[3]);
                }
#else
                const float2 scale = unpack<__half>(*reinterpret_cast<const uint32_t*>(
                    mine + j * kSlot + kLoad + 4 * kBlocks * c + 4 * b));
#pragma unroll
                for (int i = 0; i < kSlices; ++i) {
                    const uint32_t even[4] = {low[i].x, high[i].x, low[i].y, high[i].y};
                    const uint32_t odd[4] = {low[i].z, high[i].z, low[i].w, high[i].w};
                    float of_block[4] = {};
                    mma<T>(of_block, even, pairs[0], pairs[1]);
                    mma<T>(of_block, odd, pairs[2], pairs[3]);
                    sums[i][j][0] = fmaf(scale.x, of_block[0], sums[i][j][0]);
                    sums[i][j][1] = fmaf(scale.y, of_block[1], sums[i][j][1]);
                    sums[i][j][2] = fmaf(scale.x, of_block[2], sums[i][j][2]);
                    sums[i][j][3] = fmaf(scale.y, of_block[3], sums[i][j][3]);
                }
#endif
            }
        }
    }
};

// What a block brings into shared memory.
struct Source {
    const unsigned char* input;   // of the block's first row
    const unsigned char* weights[2];  // of the terms; the same without DIJIANG_SWIGLU
    int rows, inner, chunks, last_tile, first_tile;
    bool gated;

    template <int kFormat, int kRows> __device__ void request(int chunk, unsigned char* to_input, unsigned char* to_weights) const {
        constexpr int kElements = chunk_elements(kFormat), kUnits = kElements / 8, kBytes = chunk_bytes(kFormat);
#pragma unroll 8
        for (int at = threadIdx.x; at < kRows * kUnits; at += 128) {
            const int row = at / kUnits, unit = at % kUnits, column = chunk * kElements + 8 * unit;
            const bool there = row < rows && column < inner;
            const int64_t element = there ? int64_t{row} * inner + column : 0;
            copy_async(shared_address(to_input) + 16 * swizzled(row, unit, kUnits), input + 2 * element, there);
        }
#pragma unroll 1
        for (int at = threadIdx.x; at < 16 * (kBytes / 16); at += 128) {
            const int slot = at / (kBytes / 16), unit = at % (kBytes / 16);
            const int second = gated ? slot % 8 / 4 : 0;
            const int tile = min(first_tile + (gated ? slot / 8 * 4 + slot % 4 : slot), last_tile);
            copy_async(shared_address(to_weights) + slot * kSlot + 16 * unit,
                       weights[second] + (int64_t{tile} * chunks + chunk) * kBytes + 16 * unit, true);
        }
    }
};

template <typename T, int kSlices>
__global__ void __launch_bounds__(128, 2) many_kernel(const __grid_constant__ Params p) {
    constexpr int kRows = 32 * kSlices;
    extern __shared__ uint4 shared[];
    let_next_kernel_start();
    wait_for_previous_kernel();
    int o = p.call.output_count - 1;
    while (o > 0 && static_cast<int>(blockIdx.y) < p.outputs[o].first_block) --o;
    const OutputCut& cut = p.outputs[o];
    const dijiang_linear_output& out = p.call.outputs[o];
    const bool gated = out.activation == DIJIANG_SWIGLU;
    const int first_row = kRows * blockIdx.x;
    const int tiles = gated ? 8 : 16;
    const int first_tile = (blockIdx.y - cut.first_block) * tiles;
    unsigned char* const inputs = reinterpret_cast<unsigned char*>(shared);
    const int stage = p.staged_offset, weights_at = p.sums_offset;  // bytes of a stage, and before its weights

    Tile<T, kSlices> tile;
    int turn = 0;
    for (int t = 0; t < (gated ? 1 : cut.terms); ++t) {
        const dijiang_linear_term& term = p.call.terms[cut.term + t];
        const Term& shape = p.terms[cut.term + t];
        const dijiang_linear_term& other = gated ? p.call.terms[cut.term + 1] : term;
        const Source source = {static_cast<const unsigned char*>(term.input) + int64_t{first_row} * term.inner * 2,
                               {static_cast<const unsigned char*>(term.weight),
                                static_cast<const unsigned char*>(other.weight)},
                               p.call.rows - first_row, term.inner, shape.chunks, (out.width - 1) / kTile, first_tile, gated};
        const auto request = [&](int chunk, int where) {
            unsigned char* const to = inputs + where * stage;
            if (chunk < shape.chunks) {
                if (shape.format == DIJIANG_INT4) source.template request<DIJIANG_INT4, kRows>(chunk, to, to + weights_at);
                else source.template request<DIJIANG_INT8, kRows>(chunk, to, to + weights_at);
            }
            commit_copies();
        };
        request(0, turn);
        for (int chunk = 0; chunk < shape.chunks; ++chunk) {
            wait_copies<0>();
            __syncthreads();  // the chunk is there, and all have read the one before it
            request(chunk + 1, turn ^ 1);
            const unsigned char* const here = inputs + turn * stage;
            if (shape.format == DIJIANG_INT4) tile.template multiply<DIJIANG_INT4>(here, here + weights_at);
            else tile.template multiply<DIJIANG_INT8>(here, here + weights_at);
            turn ^= 1;
        }
    }

    const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4, warp = threadIdx.x / 32;
    const float* const first_bias = p.call.terms[cut.term].bias;
    const float* const second_bias = cut.terms > 1 ? p.call.terms[cut.term + 1].bias : nullptr;
    const int count = gated ? 4 : 8, width = out.width;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        if (j >= count) break;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int column = (first_tile + warp % 2 * count + j) * kTile + 2 * c + h;
            if (column >= width) continue;
            const float one = first_bias == nullptr ? 0.0f : __ldg(first_bias + column);
            const float two = second_bias == nullptr ? 0.0f : __ldg(second_bias + column);
#pragma unroll
            for (int i = 0; i < kSlices; ++i)
#pragma unroll
                for (int low = 0; low < 2; ++low) {
                    const int row = first_row + warp / 2 * (16 * kSlices) + 16 * i + 8 * low + g;
                    if (row >= p.call.rows) continue;
                    const float x = tile.sums[i][j][2 * low + h] + one + (gated ? 0.0f : two);
                    const float second = gated ? tile.sums[i][(j + 4) % 8][2 * low + h] + two : 0.0f;
                    float y = linear::activate(out.activation, x, second);
                    const int64_t at = int64_t{row} * width + column;
                    if (out.residual != nullptr) y += to_float(static_cast<const T*>(out.residual)[at]);
                    static_cast<T*>(out.output)[at] = from_float<T>(y);
                }
        }
    }
}

template <typename T> cudaError_t launch(const Launch& launch, bool overlap, cudaStream_t stream) {
    void (*const kernel)(Params) = launch.many                        ? (launch.params.rows_per_block > 64 ? many_kernel<T, 4> : many_kernel<T, 2>)
                                   : launch.params.rows_per_block > 8 ? few_kernel<T, true>
                                                                      : few_kernel<T, false>;
    if (launch.shared_memory > 48 * 1024) {
        const cudaError_t status =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, launch.shared_memory);
        if (status != cudaSuccess) return status;
    }
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = launch.many ? dim3(static_cast<unsigned>(launch.row_blocks), static_cast<unsigned>(launch.blocks))
                                 : dim3(static_cast<unsigned>(launch.blocks), static_cast<unsigned>(launch.row_blocks));
    config.blockDim = dim3(static_cast<unsigned>(launch.threads));
    config.dynamicSmemBytes = static_cast<size_t>(launch.shared_memory);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = overlap ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, launch.params);
}

}  // namespace quantized
}  // namespace dijiang
