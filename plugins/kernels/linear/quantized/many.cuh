// Quantised products of many rows: tiles of 128 or 64 rows by 128 weight rows, of which four warps have a quarter each.
//
// A chunk's inputs and weights come into shared memory, two chunks in turn; weights are widened in registers, exactly,
// and a block's sums, float32, are scaled when they are added to the others. With DIJIANG_SWIGLU half of a tile's
// weight rows are the second term's, for the same output elements.
#pragma once

#include "device/activation.cuh"
#include "device/copies.cuh"
#include "device/elements.cuh"
#include "device/mma.cuh"
#include "device/overlap.cuh"
#include "linear/quantized/weights.cuh"

namespace dijiang {
namespace quantized {

// Where 16 bytes of a row lie, in units of 16 bytes: those of eight neighbouring rows in different banks.
__device__ __forceinline__ int swizzled(int row, int unit, int units) { return row * units + (unit ^ (row % 8)); }

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

    // Rows of kPitch, a column a weight row.
    __device__ __forceinline__ void store(float* to) const {
        const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4, warp = threadIdx.x / 32;
        to += (warp / 2 * (16 * kSlices) + g) * kPitch + warp % 2 * 64 + 2 * c;
#pragma unroll
        for (int i = 0; i < kSlices; ++i)
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                float* const here = to + 16 * i * kPitch + 8 * j;
                *reinterpret_cast<float2*>(here) = {sums[i][j][0], sums[i][j][1]};
                *reinterpret_cast<float2*>(here + 8 * kPitch) = {sums[i][j][2], sums[i][j][3]};
            }
    }

    template <int kFormat>
    __device__ __forceinline__ void multiply(const unsigned char* input, const unsigned char* weights) {
        constexpr int kBlocks = kFormat == DIJIANG_INT4 ? 4 : 2, kUnits = chunk_elements(kFormat) / 8;
        const int lane = threadIdx.x % 32, c = lane % 4, warp = threadIdx.x / 32;
        const uint32_t rows = shared_address(input) + (warp / 2 * (16 * kSlices) + lane % 16) * (16 * kUnits);
        const unsigned char* const mine = weights + warp % 2 * (8 * kSlot);
#pragma unroll 1
        for (int b = 0; b < kBlocks; ++b) {
            uint32_t even[kSlices][4], odd[kSlices][4];
            const uint32_t one = rows + 16 * ((4 * b + lane / 16) ^ (lane % 8));
            const uint32_t other = rows + 16 * ((4 * b + 2 + lane / 16) ^ (lane % 8));
#pragma unroll
            for (int i = 0; i < kSlices; ++i) {
                ldmatrix(even[i], one + 256 * i * kUnits);
                ldmatrix(odd[i], other + 256 * i * kUnits);
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
                const float2 scale = unpack<__half>(*reinterpret_cast<const uint32_t*>(
                    mine + j * kSlot + kLoad + 4 * kBlocks * c + 4 * b));
#pragma unroll
                for (int i = 0; i < kSlices; ++i) {
                    float of_block[4] = {};
                    mma<T>(of_block, even[i], pairs[0], pairs[1]);
                    mma<T>(of_block, odd[i], pairs[2], pairs[3]);
                    sums[i][j][0] = fmaf(scale.x, of_block[0], sums[i][j][0]);
                    sums[i][j][1] = fmaf(scale.y, of_block[1], sums[i][j][1]);
                    sums[i][j][2] = fmaf(scale.x, of_block[2], sums[i][j][2]);
                    sums[i][j][3] = fmaf(scale.y, of_block[3], sums[i][j][3]);
                }
            }
        }
    }
};

// What a block brings into shared memory.
struct Source {
    const unsigned char* input;   // of the block's first row
    const unsigned char *first, *second;  // weights of the terms; the second's with DIJIANG_SWIGLU
    int rows, inner, chunks, last_tile, first_tile;
    bool gated;

    template <int kFormat, int kRows> __device__ void request(int chunk, uint32_t to_input, uint32_t to_weights) const {
        constexpr int kElements = chunk_elements(kFormat), kUnits = kElements / 8, kBytes = chunk_bytes(kFormat);
        constexpr int kAtOnce = 128 / kUnits;  // rows; an even number, so a thread's place in a row stays
        const int row = threadIdx.x / kUnits, unit = threadIdx.x % kUnits, column = chunk * kElements + 8 * unit;
        const unsigned char* from = input + 2 * (int64_t{row} * inner + column);
        uint32_t to = to_input + 16 * swizzled(row, unit, kUnits);
#pragma unroll 1
        for (int at = row; at < kRows; at += kAtOnce) {
            const bool there = at < rows && column < inner;
            copy_async(to, there ? from : input, there);
            from += int64_t{2 * kAtOnce} * inner;
            to += 16 * kAtOnce * kUnits;
        }
        const int lane = threadIdx.x % 32;
#pragma unroll 1
        for (int slot = threadIdx.x / 32; slot < 16; slot += 4) {
            const unsigned char* const term = gated && slot % 8 >= 4 ? second : first;
            const int tile = min(first_tile + (gated ? slot / 8 * 4 + slot % 4 : slot), last_tile);
            const unsigned char* const chunk_at = term + (int64_t{tile} * chunks + chunk) * kBytes + 16 * lane;
            const uint32_t here = to_weights + slot * kSlot + 16 * lane;
            copy_async(here, chunk_at, true);
            if (lane < (kBytes - kLoad) / 16) copy_async(here + kLoad, chunk_at + kLoad, true);
        }
    }
};

// What a thread does with the sums of its two columns, every `step`-th row.
template <typename T> struct Finish {
    const float* at;  // of the sums
    T* to;
    const T* added;   // a residual, or null
    float2 bias, second_bias;
    int row, rows, step, width;
    bool both, aligned;  // is the second column there, and can both be read and written at once?

    template <int kActivation> __device__ __forceinline__ void run() {
        constexpr bool kGated = kActivation == DIJIANG_SWIGLU;
        const int64_t stride = int64_t{step} * width;
#pragma unroll 4
        for (; row < rows; row += step) {
            const float2 x = *reinterpret_cast<const float2*>(at);
            const float2 other = kGated ? *reinterpret_cast<const float2*>(at + 32) : float2{0.0f, 0.0f};
            float2 rest = {0.0f, 0.0f};
            if (added != nullptr) {
                if (aligned) rest = unpack<T>(*reinterpret_cast<const uint32_t*>(added));
                else rest = {to_float(added[0]), both ? to_float(added[1]) : 0.0f};
                added += stride;
            }
            const float one = activate(kActivation, x.x + bias.x, other.x + second_bias.x) + rest.x;
            const float two = activate(kActivation, x.y + bias.y, other.y + second_bias.y) + rest.y;
            if (aligned) {
                *reinterpret_cast<uint32_t*>(to) = pack<T>(one, two);
            } else {
                to[0] = from_float<T>(one);
                if (both) to[1] = from_float<T>(two);
            }
            to += stride;
            at += step * kPitch;
        }
    }
};

template <typename T, int kSlices>
__global__ void __launch_bounds__(128, kSlices == 2 ? 3 : 2) many_kernel(const __grid_constant__ Params p) {
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
                               static_cast<const unsigned char*>(term.weight),
                               static_cast<const unsigned char*>(other.weight), p.call.rows - first_row, term.inner, shape.chunks, (out.width - 1) / kTile, first_tile, gated};
        const auto request = [&](int chunk, int where) {
            const uint32_t to = shared_address(inputs + where * stage);
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

    // Sums to shared memory, and from there row by row: what is done with them is code for one, not for 128.
    __syncthreads();
    float* const sums = reinterpret_cast<float*>(shared);
    tile.store(sums);
    __syncthreads();
    const float* const first_bias = p.call.terms[cut.term].bias;
    const float* const second_bias = cut.terms > 1 ? p.call.terms[cut.term + 1].bias : nullptr;
    // A thread has two neighbouring columns of 128 weight rows, or of 64 with the second term's beside them.
    const int pairs = gated ? 32 : 64, pair = threadIdx.x % pairs, width = out.width;
    const int column = first_tile * kTile + 2 * pair;
    if (column >= width) return;
    Finish<T> finish;
    finish.at = sums + threadIdx.x / pairs * kPitch + (gated ? 2 * pair + pair / 16 * 32 : 2 * pair);
    finish.row = first_row + threadIdx.x / pairs, finish.rows = min(first_row + kRows, p.call.rows);
    finish.step = 128 / pairs, finish.width = width;
    finish.both = column + 1 < width, finish.aligned = width % 2 == 0;
    const auto bias_of = [&](const float* bias) {
        return bias == nullptr ? float2{0.0f, 0.0f}
                               : float2{__ldg(bias + column), finish.both ? __ldg(bias + column + 1) : 0.0f};
    };
    const float2 one = bias_of(first_bias), two = bias_of(second_bias);
    finish.bias = gated ? one : float2{one.x + two.x, one.y + two.y};
    finish.second_bias = two;
    const int64_t place = int64_t{finish.row} * width + column;
    finish.to = static_cast<T*>(out.output) + place;
    finish.added = static_cast<const T*>(out.residual);
    if (finish.added != nullptr) finish.added += place;
    switch (out.activation) {  // here, not for each element
        case DIJIANG_RELU: finish.template run<DIJIANG_RELU>(); break;
        case DIJIANG_GELU: finish.template run<DIJIANG_GELU>(); break;
        case DIJIANG_GELU_TANH: finish.template run<DIJIANG_GELU_TANH>(); break;
        case DIJIANG_SILU: finish.template run<DIJIANG_SILU>(); break;
        case DIJIANG_SWIGLU: finish.template run<DIJIANG_SWIGLU>(); break;
        default: finish.template run<DIJIANG_IDENTITY>();
    }
}

}  // namespace quantized
}  // namespace dijiang
