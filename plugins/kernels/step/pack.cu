// Launches the kernels that pack weights.
#include "step/pack.cuh"
#include "step/quantised/pack.cuh"

namespace dijiang {
namespace step {
namespace {

// Enqueues a kernel of (at least) that many threads; the emulation on a host has its own.
#ifndef DIJIANG_PACK_EACH
constexpr int kPackThreads = 256;
constexpr int64_t kMostBlocks = 65536;
unsigned blocks_for(int64_t threads) {
    const int64_t blocks = (threads + kPackThreads - 1) / kPackThreads;
    return static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks);
}
#define DIJIANG_PACK_EACH(threads, kernel, ...) kernel<<<blocks_for(threads), kPackThreads, 0, stream>>>(__VA_ARGS__)
#endif

void copy(const float* from, int64_t count, uint8_t* to, cudaStream_t stream) {
    if (count > 0)
        DIJIANG_PACK_EACH(count, copy_floats, from, count, reinterpret_cast<float*>(to));
}

void norm(const float* weight, const float* bias, int64_t count, uint8_t* to, cudaStream_t stream) {
    DIJIANG_PACK_EACH(count, pack_norm, weight, bias, count, reinterpret_cast<float2*>(to));
}

void pack(const Layout& it, int layer, int matrix, const void* first, const void* second, uint8_t* packed,
          cudaStream_t stream) {
    const int64_t pieces = int64_t{it.groups(matrix)} * it.chunks(matrix) * 32;
    const Two both{{first, second}};
    DIJIANG_PACK_EACH(pieces, pack_matrix, it, layer, matrix, both, packed);
}

void bias(const Layout& it, int matrix, const float* first, const float* second, uint8_t* to, cudaStream_t stream) {
    const int rows = it.groups(matrix) * kGroup;
    DIJIANG_PACK_EACH(rows, pack_bias, it, matrix, first, second, reinterpret_cast<float*>(to));
}

template <typename T> void proj(int d, const float* from, uint8_t* to, cudaStream_t stream) {
    const int count = d * ((d + kChunk - 1) / kChunk) * kChunk;
    DIJIANG_PACK_EACH(count, pack_proj<T>, d, from, reinterpret_cast<T*>(to));
}

}  // namespace

cudaError_t pack_layer(const Layout& it, int32_t dtype, int32_t layer, const dijiang_step_layer& from, uint8_t* packed,
                       cudaStream_t stream) {
    if (!it.quantised) {
        pack(it, layer, kAttention, from.qkv, from.gate, packed, stream);
        pack(it, layer, kDense, from.dense, nullptr, packed, stream);
        pack(it, layer, kUp, from.up, from.mlp_gate, packed, stream);
        pack(it, layer, kDown, from.down, nullptr, packed, stream);
    }
    const Constants places(it);
    uint8_t* const to = packed + constants_begin(it) + layer * places.size;
    const int64_t h = it.hidden, width = it.width();
    norm(from.attention_norm_weight, from.attention_norm_bias, h, to + places.attention_norm, stream);
    norm(from.mlp_norm_weight, from.mlp_norm_bias, h, to + places.mlp_norm, stream);
    bias(it, kAttention, from.qkv_bias, nullptr, to + places.attention_bias, stream);
    bias(it, kUp, from.up_bias, from.mlp_gate_bias, to + places.up_bias, stream);
    bias(it, kDense, from.dense_bias, nullptr, to + places.dense_bias, stream);
    bias(it, kDown, from.down_bias, nullptr, to + places.down_bias, stream);
    norm(from.norm_weight, from.norm_bias, width, to + places.group_norm, stream);
    if (dtype == DIJIANG_FLOAT16) proj<__half>(it.head_dim, from.proj, to + places.proj, stream);
    else proj<__nv_bfloat16>(it.head_dim, from.proj, to + places.proj, stream);
    const int64_t entries = int64_t{it.heads} * (it.table_rows ? it.table_rows : 1);
    copy(from.log_decay, entries, to + places.terms, stream);
    if (it.table_rows) {
        copy(from.gain, entries, to + places.terms + 4 * entries, stream);
        copy(from.read_scale, entries, to + places.terms + 8 * entries, stream);
    }
    return cudaGetLastError();
}

cudaError_t pack_quantised(const Layout& it, int32_t layer, int32_t which, const void* values, const void* scales,
                           uint8_t* packed, cudaStream_t stream) {
    const uint32_t formats = formats_of(it, layer);
    const bool head = which == DIJIANG_STEP_HEAD;
    const QuantisedSource from{static_cast<const uint8_t*>(values), static_cast<const uint16_t*>(scales), which,
                               head ? it.head_int8 : bit(formats, which)};
    const int matrix = head                         ? kHead
                       : which == DIJIANG_STEP_DOWN  ? kDown
                       : which == DIJIANG_STEP_DENSE ? kDense
                       : which >= DIJIANG_STEP_UP    ? kUp
                                                     : kAttention;
    const int64_t begin = matrix_begin(it, layer, matrix);
    const int64_t threads = int64_t{it.groups(matrix)} * units_of_group(it.chunks(matrix), true) * 32;
    DIJIANG_PACK_EACH(threads, pack_quantised_matrix, it, formats, matrix, begin, from, packed);
    return cudaGetLastError();
}

cudaError_t pack_ends(const Layout& it, int32_t, const dijiang_step_ends& from, uint8_t* packed, cudaStream_t stream) {
    if (!it.quantised) pack(it, 0, kHead, from.head, nullptr, packed, stream);
    uint8_t* const to = packed + ends_begin(it);
    const int64_t h = it.hidden;
    norm(from.norm_weight, from.norm_bias, h, to, stream);
    copy(from.inv_freq, it.rotary_dim / 2, to + 8 * h, stream);
    return cudaGetLastError();
}

}  // namespace step
}  // namespace dijiang
