#include "attention/checks.h"

#include <algorithm>
#include <cinttypes>
#include <cmath>

#include "host/arguments.h"
#include "host/errors.h"

namespace dijiang {
namespace {

int64_t element_size(const dijiang_geometry& g) { return g.dtype == DIJIANG_FLOAT32 ? 4 : 2; }

// The two strides of a tensor [batch, length, width], zeros made dense. `granule`: elements in 16 bytes.
dijiang_status check_strides(const char* name, int64_t batch, int64_t length, int64_t width, int64_t granule,
                             int64_t& batch_stride, int64_t& token_stride) {
    const struct {
        const char* kind;
        int64_t value;
    } strides[] = {{"batch", batch_stride}, {"token", token_stride}};
    for (const auto& stride : strides)
        if (stride.value < 0 || stride.value > kMostStride || stride.value % granule != 0)
            return fail(DIJIANG_INVALID_ARGUMENT,
                        "%s_%s_stride is not possible; got %" PRId64
                        "; expected 0 (dense) "
                        "or a multiple of %" PRId64 " elements (16 bytes) below 2^40",
                        name, stride.kind, stride.value, granule);
    if (token_stride == 0) token_stride = width;
    if (batch_stride == 0) batch_stride = std::max(length * token_stride, width);
    const bool tokens_inside = length == 1 || token_stride >= width;
    const bool batch_outside =
        batch == 1 || batch_stride >= (length - 1) * (length == 1 ? 0 : token_stride) + width;
    // [length, batch, width] is as good as [batch, length, width].
    const bool batch_inside = batch == 1 || batch_stride >= width;
    const bool tokens_outside =
        length == 1 || token_stride >= (batch - 1) * (batch == 1 ? 0 : batch_stride) + width;
    if ((tokens_inside && batch_outside) || (batch_inside && tokens_outside)) return DIJIANG_OK;
    return fail(DIJIANG_INVALID_ARGUMENT,
                "the strides of %s let its rows overlap; got batch stride %" PRId64
                " and token stride %" PRId64 " for %" PRId64 " x %" PRId64 " rows of %" PRId64
                " elements; expected "
                "strides that keep the rows apart",
                name, batch_stride, token_stride, batch, length, width);
}

dijiang_status check_state_strides(const dijiang_geometry& g, int32_t batch,
                                   const dijiang_attention_buffers& b, AttentionParams& p) {
    const int64_t state = int64_t{g.num_heads} * g.head_dim * g.head_dim;
    int64_t unused = 0;
    p.past_batch_stride = b.past_batch_stride;
    p.present_batch_stride = b.present_batch_stride;
    DIJIANG_TRY(check_strides("past", batch, 1, state, 4, p.past_batch_stride, unused));
    unused = 0;
    return check_strides("present", batch, 1, state, 4, p.present_batch_stride, unused);
}

Region state_region(const char* name, const float* pointer, int64_t state, int64_t batch, int64_t stride,
                    bool written) {
    return {name, reinterpret_cast<uintptr_t>(pointer), 4 * state, 1, 0, batch, 4 * stride, written};
}

// present_state is past_state itself, or has no byte of it.
dijiang_status check_state_alias(const Region& past, const Region& present) {
    if (past.begin == present.begin) {
        if (past.outer == 1 || past.outer_stride == present.outer_stride) return DIJIANG_OK;
        return fail(DIJIANG_INVALID_ARGUMENT,
                    "present_state is past_state with another stride; got %" PRId64 " and %" PRId64
                    " elements; expected equal strides in place",
                    present.outer_stride / 4, past.outer_stride / 4);
    }
    if (disjoint(past, present)) return DIJIANG_OK;
    return fail(DIJIANG_INVALID_ARGUMENT,
                "present_state overlaps past_state partly; got 0x%" PRIxPTR " and 0x%" PRIxPTR
                "; expected past_state itself or memory of its own",
                present.begin, past.begin);
}

dijiang_status check_pointers(const dijiang_geometry& g, const dijiang_attention_buffers& b) {
    const bool tables = g.table_rows > 0;
    const struct {
        const char* name;
        const void* pointer;
        uintptr_t alignment;
        bool required;
    } pointers[] = {
        {"qkv", b.qkv, 16, true},
        {"gate", b.gate, 16, true},
        {"past_state", b.past_state, 16, true},
        {"positions", b.positions, 4, true},
        {"seq_lens", b.seq_lens, 4, true},
        {"proj", b.proj, 16, true},
        {"norm_weight", b.norm_weight, 16, true},
        {"norm_bias", b.norm_bias, 16, true},
        {"inv_freq", b.inv_freq, 16, g.rotary_dim > 0},
        {"log_decay", b.log_decay, 16, true},
        {"gain", b.gain, 16, tables},
        {"read_scale", b.read_scale, 16, tables},
        {"output", b.output, 16, true},
        {"present_state", b.present_state, 16, true},
        {"workspace", b.workspace, 16, false},
        {"sync", b.sync, 16, false},
    };
    for (const auto& it : pointers)
        if (it.required || it.pointer != nullptr)
            DIJIANG_TRY(check_pointer(it.name, it.pointer, it.alignment));
    if (!tables && (b.gain != nullptr || b.read_scale != nullptr))
        return fail(DIJIANG_INVALID_ARGUMENT,
                    "%s is given without tables; got a pointer with table_rows 0; expected "
                    "NULL, or table_rows >= 1",
                    b.gain != nullptr ? "gain" : "read_scale");
    return DIJIANG_OK;
}

dijiang_status check_overlaps(const dijiang_geometry& g, const AttentionParams& p,
                              const dijiang_attention_buffers& b) {
    const int64_t heads = g.num_heads, d = g.head_dim, size = element_size(g);
    const int64_t channels = heads * d, packed = (heads + 2 * int64_t{g.num_kv_heads}) * d,
                  state = heads * d * d;
    const int64_t table = 4 * heads * (g.table_rows > 0 ? g.table_rows : 1), rows = 4 * int64_t{p.batch};
    const auto tokens = [&](const char* name, const void* pointer, int64_t width, int64_t batch_stride,
                            int64_t token_stride, bool written) {
        return Region{name,
                      reinterpret_cast<uintptr_t>(pointer),
                      size * width,
                      p.length,
                      size * token_stride,
                      p.batch,
                      size * batch_stride,
                      written};
    };
    const Region past = state_region("past_state", p.past_state, state, p.batch, p.past_batch_stride, false);
    const Region present =
        state_region("present_state", p.present_state, state, p.batch, p.present_batch_stride, true);
    const Region regions[] = {
        past,
        present,
        tokens("qkv", p.qkv, packed, p.qkv_batch_stride, p.qkv_token_stride, false),
        tokens("gate", p.gate, channels, p.gate_batch_stride, p.gate_token_stride, false),
        dense("positions", p.positions, rows, false),
        dense("seq_lens", p.seq_lens, rows, false),
        dense("proj", p.proj, 4 * d * d, false),
        dense("norm_weight", p.norm_weight, 4 * channels, false),
        dense("norm_bias", p.norm_bias, 4 * channels, false),
        dense("inv_freq", p.inv_freq, 2 * int64_t{g.rotary_dim}, false),
        dense("log_decay", p.log_decay, table, false),
        dense("gain", p.gain, table, false),
        dense("read_scale", p.read_scale, table, false),
        tokens("output", p.output, channels, p.output_batch_stride, p.output_token_stride, true),
        dense("workspace", p.workspace, static_cast<int64_t>(b.workspace_size), true),
        dense("sync", p.sync, static_cast<int64_t>(b.sync_size), true),
    };
    DIJIANG_TRY(check_state_alias(past, present));
    return check_apart(regions, sizeof regions / sizeof *regions, 0, 1);
}

}  // namespace

dijiang_status check_geometry(const dijiang_geometry* geometry) {
    if (geometry == nullptr)
        return fail(DIJIANG_INVALID_ARGUMENT, "geometry is missing; got NULL; expected a dijiang_geometry");
    const dijiang_geometry& g = *geometry;
    if (g.num_heads < 1) return invalid_range("num_heads", g.num_heads, "1 or more");
    if (g.num_heads > DIJIANG_MAX_HEADS)
        return fail(DIJIANG_UNSUPPORTED,
                    "num_heads is more than the kernels support; got %d; expected 1 to %d", g.num_heads,
                    DIJIANG_MAX_HEADS);
    if (g.num_kv_heads < 1 || g.num_heads % g.num_kv_heads != 0)
        return fail(DIJIANG_INVALID_ARGUMENT,
                    "num_kv_heads does not divide num_heads; got %d; expected a divisor of %d",
                    g.num_kv_heads, g.num_heads);
    if (g.head_dim < 1) return invalid_range("head_dim", g.head_dim, "a multiple of 16 in 16 to 256");
    if (g.head_dim % 16 != 0 || g.head_dim > 256)
        return fail(DIJIANG_UNSUPPORTED,
                    "head_dim is not one that the kernels support; got %d; expected a multiple of 16 "
                    "in 16 to 256",
                    g.head_dim);
    if (g.rotary_dim < 0 || g.rotary_dim > g.head_dim || g.rotary_dim % 2 != 0)
        return fail(DIJIANG_INVALID_ARGUMENT,
                    "rotary_dim is not possible; got %d; expected an even number in 0 to %d "
                    "(head_dim)",
                    g.rotary_dim, g.head_dim);
    if (g.dtype != DIJIANG_FLOAT32 && g.dtype != DIJIANG_FLOAT16 && g.dtype != DIJIANG_BFLOAT16)
        return invalid_range("dtype", g.dtype, "0 (float32), 1 (float16) or 2 (bfloat16)");
    if (g.table_rows < 0) return invalid_range("table_rows", g.table_rows, "0 (geometric) or more");
    if (!(g.epsilon > 0) || !std::isfinite(g.epsilon))
        return fail(DIJIANG_INVALID_ARGUMENT,
                    "epsilon is out of range; got %g; expected a finite number above 0",
                    static_cast<double>(g.epsilon));
    if (g.reserved != 0)
        return fail(DIJIANG_INVALID_ARGUMENT, "geometry.reserved must be zero; got %d; expected 0",
                    g.reserved);
    return DIJIANG_OK;
}

dijiang_status check_states(const dijiang_geometry& g, int32_t batch, const dijiang_attention_buffers& b,
                            AttentionParams& p) {
    DIJIANG_TRY(check_pointer("past_state", b.past_state, 16));
    DIJIANG_TRY(check_pointer("present_state", b.present_state, 16));
    DIJIANG_TRY(check_state_strides(g, batch, b, p));
    const int64_t state = int64_t{g.num_heads} * g.head_dim * g.head_dim;
    return check_state_alias(
        state_region("past_state", b.past_state, state, batch, p.past_batch_stride, false),
        state_region("present_state", b.present_state, state, batch, p.present_batch_stride, true));
}

dijiang_status check_attention(const dijiang_geometry& g, int32_t batch, int32_t length,
                               const dijiang_attention_buffers& b, AttentionParams& p) {
    DIJIANG_TRY(check_pointers(g, b));
    const int64_t channels = int64_t{g.num_heads} * g.head_dim;
    const int64_t packed = channels + 2 * int64_t{g.num_kv_heads} * g.head_dim,
                  granule = 16 / element_size(g);
    p = {batch,
         length,
         g.num_heads,
         g.num_kv_heads,
         g.head_dim,
         g.rotary_dim,
         g.table_rows,
         g.epsilon,
         b.qkv,
         b.gate,
         b.past_state,
         b.positions,
         b.seq_lens,
         b.proj,
         b.norm_weight,
         b.norm_bias,
         b.inv_freq,
         b.log_decay,
         b.gain,
         b.read_scale,
         b.output,
         b.present_state,
         b.qkv_batch_stride,
         b.qkv_token_stride,
         b.gate_batch_stride,
         b.gate_token_stride,
         b.output_batch_stride,
         b.output_token_stride,
         b.past_batch_stride,
         b.present_batch_stride,
         b.workspace,
         static_cast<uint32_t*>(b.sync)};
    DIJIANG_TRY(check_strides("qkv", batch, length, packed, granule, p.qkv_batch_stride, p.qkv_token_stride));
    DIJIANG_TRY(
        check_strides("gate", batch, length, channels, granule, p.gate_batch_stride, p.gate_token_stride));
    DIJIANG_TRY(check_strides("output", batch, length, channels, granule, p.output_batch_stride,
                              p.output_token_stride));
    DIJIANG_TRY(check_state_strides(g, batch, b, p));
    return check_overlaps(g, p, b);
}

dijiang_status check_scratch(const dijiang_attention_buffers& b, const Needs& needs) {
    const struct {
        const char* name;
        const void* pointer;
        size_t size, need;
    } scratch[] = {{"workspace", b.workspace, b.workspace_size, needs.workspace},
                   {"sync", b.sync, b.sync_size, needs.sync}};
    for (const auto& it : scratch) {
        if (it.size < it.need)
            return fail(
                DIJIANG_INVALID_ARGUMENT,
                "%s_size is too small; got %zu; expected %zu bytes or more (dijiang_attention_%s_size)",
                it.name, it.size, it.need, it.name);
        if (it.need > 0) DIJIANG_TRY(check_pointer(it.name, it.pointer, 16));
    }
    return DIJIANG_OK;
}

}  // namespace dijiang
