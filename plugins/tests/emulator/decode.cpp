// Decode of many states in two launches on a CPU: its own kernels, on emulated threads.
#include "cuda_on_cpu.h"

#include "attention/decode/batch/kernels.cuh"

namespace dijiang::decode {
namespace {

alignas(128) unsigned char shared[emulator::kSharedMemory];

template <typename T, typename F, typename S> void run(const AttentionParams& p, bool backwards) {
    emulator::shared_memory = shared;
    const int per_row = p.num_heads + p.num_kv_heads, set = S::W == S::D ? set_heads(p.num_heads, S::D) : 1;
    const FeatureCut features = {p.batch * per_row, per_row};
    const StateCut states = {S::D / S::W, set, p.num_heads / set, p.num_heads / p.num_kv_heads, per_row,
                             1.0f / static_cast<float>(p.num_heads)};
    if (set > S::kMostHeads || F::kMemory > static_cast<int>(emulator::kSharedMemory)) std::abort();
    const int feature_blocks = (features.vectors + F::kVectors - 1) / F::kVectors * F::kSlices;
    for (int i = 0; i < feature_blocks; ++i)
        emulator::run_block({static_cast<unsigned>(i), 1, 1}, dim3(F::kThreads),
                            [&] { make_features<T, F>(p, features, emulator::shared_memory); }, backwards);
    const int state_blocks = p.batch * p.num_heads / set * states.splits;
    for (int i = 0; i < state_blocks; ++i)
        emulator::run_block({static_cast<unsigned>(i), 1, 1}, dim3(static_cast<unsigned>(set * S::kThreads)),
                            [&] { stream_states<T, S>(p, states, emulator::shared_memory); }, backwards);
}

template <typename T> void run(const AttentionParams& p, bool backwards) {
    switch (p.head_dim) {
        case 64: return run<T, FeatureShape<64, 64>, StateShape<64, 64, 128, 8, 1, 4, 0, false>>(p, backwards);
        case 80: return run<T, FeatureShape<80, 80>, StateShape<80, 80, 160, 10, 1, 3, 0, false>>(p, backwards);
        case 256: return run<T, FeatureShape<256, 64>, StateShape<256, 64, 256, 8, 4, 1, 3, true>>(p, backwards);
        default: std::abort();
    }
}

}  // namespace

// As in decode.cpp, which needs CUDA's runtime.
int32_t set_heads(int32_t num_heads, int32_t head_dim) {
    int32_t a = num_heads, b = head_dim;
    while (b != 0) a %= b, std::swap(a, b);
    return num_heads / a;
}

}  // namespace dijiang::decode

// A valid call of one token per row whose pointers are the host's, with all strides given.
extern "C" void emulate_decode(const dijiang_geometry* g, int32_t batch, const dijiang_attention_buffers* b,
                               int32_t backwards) {
    using namespace dijiang;
    AttentionParams p = {};
    p.batch = batch, p.length = 1;
    p.num_heads = g->num_heads, p.num_kv_heads = g->num_kv_heads, p.head_dim = g->head_dim;
    p.rotary_dim = g->rotary_dim, p.table_rows = g->table_rows, p.epsilon = g->epsilon;
    p.qkv = b->qkv, p.gate = b->gate, p.past_state = b->past_state, p.positions = b->positions, p.seq_lens = b->seq_lens;
    p.proj = b->proj, p.norm_weight = b->norm_weight, p.norm_bias = b->norm_bias, p.inv_freq = b->inv_freq;
    p.log_decay = b->log_decay, p.gain = b->gain, p.read_scale = b->read_scale;
    p.output = b->output, p.present_state = b->present_state, p.workspace = b->workspace;
    p.qkv_batch_stride = b->qkv_batch_stride, p.gate_batch_stride = b->gate_batch_stride;
    p.output_batch_stride = b->output_batch_stride;
    p.past_batch_stride = b->past_batch_stride, p.present_batch_stride = b->present_batch_stride;
    if (g->dtype == DIJIANG_FLOAT16) decode::run<__half>(p, backwards != 0);
    else decode::run<__nv_bfloat16>(p, backwards != 0);
}
