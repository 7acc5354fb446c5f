// Decode of many states on a CPU: its own kernel, on emulated threads.
#include "cuda_on_cpu.h"

#include "attention/decode/heads/kernel.cuh"

namespace dijiang::decode {
namespace {

constexpr int kMostBlocks = 8;  // of a cluster
alignas(128) unsigned char shared[kMostBlocks * emulator::kSharedMemory];

template <typename T, typename S> void run(const AttentionParams& p, bool backwards) {
    emulator::shared_memory = shared;
    const int set = S::kSplits == 1 ? set_heads(p.num_heads, S::D) : 1, sets = p.num_heads / set;
    if (set > S::kMostHeads || set * S::kMemory > static_cast<int>(emulator::kSharedMemory)) std::abort();
    const HeadCut cut = {set, sets, p.num_heads / p.num_kv_heads, 1.0f / static_cast<float>(p.num_heads)};
    for (int first = 0; first < p.batch * sets * S::kSplits; first += S::kSplits)
        emulator::run_cluster(static_cast<unsigned>(first), S::kSplits, dim3(static_cast<unsigned>(set * S::kThreads)),
                              shared, [&] { step_heads<T, S>(p, cut, emulator::shared_memory); }, backwards);
}

template <typename T> void run(const AttentionParams& p, bool backwards) {
    switch (p.head_dim) {
        case 64: return run<T, HeadShape64>(p, backwards);
        case 80: return run<T, HeadShape80>(p, backwards);
        case 128: return run<T, HeadShape128>(p, backwards);
        case 256: return run<T, HeadShape256>(p, backwards);
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
