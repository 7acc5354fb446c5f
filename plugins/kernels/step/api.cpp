// The C ABI of a step in one launch: check, plan, launch.
#include <cinttypes>
#include <vector>

#include "host/arguments.h"
#include "host/device.h"
#include "host/errors.h"
#include "step/step.h"

namespace dijiang {
namespace {

using step::Plan;

dijiang_status plan_for(const dijiang_step_model* model, int32_t rows, const dijiang_device* given, Plan& plan) {
    if (model == nullptr)
        return fail(DIJIANG_INVALID_ARGUMENT, "model is missing; got NULL; expected a dijiang_step_model");
    dijiang_device device{};
    DIJIANG_TRY(given_or_current(given, device));
    return step::make_plan(*model, rows, device, plan);
}

struct Pointer {
    const char* name;
    const void* pointer;
    uintptr_t alignment;
    bool required;
};
dijiang_status check_pointers(std::initializer_list<Pointer> pointers) {
    for (const Pointer& it : pointers)
        if (it.required || it.pointer != nullptr) DIJIANG_TRY(check_pointer(it.name, it.pointer, it.alignment));
    return DIJIANG_OK;
}

dijiang_status check_absent(const char* name, const void* pointer, bool absent, const char* why) {
    if (!absent || pointer == nullptr) return DIJIANG_OK;
    return fail(DIJIANG_INVALID_ARGUMENT, "%s is given, but %s; got address %p; expected NULL", name, why, pointer);
}

dijiang_status check_packed(const void* packed, size_t size, const Plan& plan) {
    DIJIANG_TRY(check_pointer("packed", packed, 128));
    const int64_t needed = step::packed_bytes(plan.params.layout);
    if (size >= static_cast<size_t>(needed)) return DIJIANG_OK;
    return fail(DIJIANG_INVALID_ARGUMENT, "packed is too small; got %zu bytes; expected %" PRId64, size, needed);
}

dijiang_status sizes(const dijiang_step_model* model, int32_t rows, const dijiang_device* device,
                     dijiang_step_size* size) {
    if (size == nullptr)
        return fail(DIJIANG_INVALID_ARGUMENT, "size is missing; got NULL; expected a dijiang_step_size");
    Plan plan;
    DIJIANG_TRY(plan_for(model, rows, device, plan));
    const step::Params& p = plan.params;
    *size = {static_cast<size_t>(step::packed_bytes(p.layout)), static_cast<size_t>(p.exchange.size), p.layout.blocks,
             step::kThreads + 32, p.memory.size, p.memory.size - p.memory.ring};
    return DIJIANG_OK;
}

dijiang_status pack_layer(const dijiang_step_model* model, int32_t layer, const dijiang_step_layer* t, void* packed,
                          size_t size, cudaStream_t stream) {
    if (t == nullptr)
        return fail(DIJIANG_INVALID_ARGUMENT, "tensors is missing; got NULL; expected a dijiang_step_layer");
    Plan plan;
    DIJIANG_TRY(plan_for(model, 0, nullptr, plan));
    if (layer < 0 || layer >= model->layers) return invalid_range("layer", layer, "0 to layers - 1");
    const bool gated = model->activation == DIJIANG_SWIGLU, tables = model->table_rows > 0, whole = model->quantised == 0;
    const char* const kQuantised = "the model's matrices are quantised: dijiang_step_pack_matrix packs them";
    DIJIANG_TRY(check_absent("qkv", t->qkv, !whole, kQuantised));
    DIJIANG_TRY(check_absent("gate", t->gate, !whole, kQuantised));
    DIJIANG_TRY(check_absent("dense", t->dense, !whole, kQuantised));
    DIJIANG_TRY(check_absent("up", t->up, !whole, kQuantised));
    DIJIANG_TRY(check_absent("mlp_gate", t->mlp_gate, !whole, kQuantised));
    DIJIANG_TRY(check_absent("down", t->down, !whole, kQuantised));
    DIJIANG_TRY(check_pointers({{"qkv", t->qkv, 16, whole}, {"gate", t->gate, 16, whole}, {"dense", t->dense, 16, whole},
                                {"up", t->up, 16, whole}, {"mlp_gate", t->mlp_gate, 16, whole && gated},
                                {"down", t->down, 16, whole}, {"qkv_bias", t->qkv_bias, 4, false},
                                {"dense_bias", t->dense_bias, 4, false}, {"up_bias", t->up_bias, 4, false},
                                {"mlp_gate_bias", t->mlp_gate_bias, 4, false}, {"down_bias", t->down_bias, 4, false},
                                {"attention_norm_weight", t->attention_norm_weight, 4, true},
                                {"attention_norm_bias", t->attention_norm_bias, 4, false},
                                {"mlp_norm_weight", t->mlp_norm_weight, 4, true},
                                {"mlp_norm_bias", t->mlp_norm_bias, 4, false}, {"proj", t->proj, 4, true},
                                {"norm_weight", t->norm_weight, 4, true}, {"norm_bias", t->norm_bias, 4, true},
                                {"log_decay", t->log_decay, 4, true}, {"gain", t->gain, 4, tables},
                                {"read_scale", t->read_scale, 4, tables}}));
    DIJIANG_TRY(check_absent("mlp_gate", t->mlp_gate, !gated, "activation is not DIJIANG_SWIGLU"));
    DIJIANG_TRY(check_absent("mlp_gate_bias", t->mlp_gate_bias, !gated, "activation is not DIJIANG_SWIGLU"));
    DIJIANG_TRY(check_absent("gain", t->gain, !tables, "table_rows is 0"));
    DIJIANG_TRY(check_absent("read_scale", t->read_scale, !tables, "table_rows is 0"));
    DIJIANG_TRY(check_packed(packed, size, plan));
    const cudaError_t error =
        step::pack_layer(plan.params.layout, model->dtype, layer, *t, static_cast<uint8_t*>(packed), stream);
    return error == cudaSuccess ? DIJIANG_OK : fail_cuda(error, "packing a layer");
}

dijiang_status pack_matrix(const dijiang_step_model* model, int32_t layer, int32_t matrix, const void* values,
                           const void* scales, void* packed, size_t size, cudaStream_t stream) {
    Plan plan;
    DIJIANG_TRY(plan_for(model, 0, nullptr, plan));
    if (model->quantised == 0)
        return fail(DIJIANG_INVALID_ARGUMENT,
                    "the model has no quantised matrices; got quantised 0; expected 1; hint: dijiang_step_pack_layer packs "
                    "matrices of T");
    if (matrix < DIJIANG_STEP_Q || matrix > DIJIANG_STEP_HEAD)
        return invalid_range("matrix", matrix, "a dijiang_step_matrix, 0 to 8");
    if (matrix == DIJIANG_STEP_MLP_GATE && model->activation != DIJIANG_SWIGLU)
        return fail(DIJIANG_INVALID_ARGUMENT, "the model has no such matrix; got DIJIANG_STEP_MLP_GATE; expected it with "
                                              "DIJIANG_SWIGLU alone");
    if (matrix != DIJIANG_STEP_HEAD && (layer < 0 || layer >= model->layers))
        return invalid_range("layer", layer, "0 to layers - 1");
    DIJIANG_TRY(check_pointers({{"values", values, 16, true}, {"scales", scales, 2, true}}));
    DIJIANG_TRY(check_packed(packed, size, plan));
    const cudaError_t error = step::pack_quantised(plan.params.layout, matrix == DIJIANG_STEP_HEAD ? 0 : layer, matrix, values,
                                                   scales, static_cast<uint8_t*>(packed), stream);
    return error == cudaSuccess ? DIJIANG_OK : fail_cuda(error, "packing a matrix");
}

dijiang_status pack_ends(const dijiang_step_model* model, const dijiang_step_ends* t, void* packed, size_t size,
                         cudaStream_t stream) {
    if (t == nullptr)
        return fail(DIJIANG_INVALID_ARGUMENT, "tensors is missing; got NULL; expected a dijiang_step_ends");
    Plan plan;
    DIJIANG_TRY(plan_for(model, 0, nullptr, plan));
    DIJIANG_TRY(check_absent("head", t->head, model->quantised != 0, "the head is quantised: dijiang_step_pack_matrix packs it"));
    DIJIANG_TRY(check_pointers({{"head", t->head, 16, model->quantised == 0},
                                {"norm_weight", t->norm_weight, 4, true},
                                {"norm_bias", t->norm_bias, 4, false},
                                {"inv_freq", t->inv_freq, 4, model->rotary_dim > 0}}));
    DIJIANG_TRY(check_packed(packed, size, plan));
    const cudaError_t error =
        step::pack_ends(plan.params.layout, model->dtype, *t, static_cast<uint8_t*>(packed), stream);
    return error == cudaSuccess ? DIJIANG_OK : fail_cuda(error, "packing what stands around the layers");
}

dijiang_status check_buffers(const dijiang_step_model& m, const dijiang_step_buffers& b, const Plan& plan,
                             int64_t state_stride, int64_t logits_stride) {
    const step::Layout& layout = plan.params.layout;
    const int64_t integer = b.integers == DIJIANG_INT64 ? 8 : 4, rows = b.rows;
    const int64_t state = int64_t{m.num_heads} * m.head_dim * m.head_dim;
    const bool scaled = m.embedding_format != DIJIANG_SAME;
    const int64_t elements = int64_t{m.vocabulary} * m.hidden;
    const int64_t embedding_bytes = m.embedding_format == DIJIANG_SAME ? 2 * elements
                                    : m.embedding_format == DIJIANG_INT8 ? elements : elements / 2;
    DIJIANG_TRY(check_absent("embedding_scales", b.embedding_scales, !scaled, "embedding_format is DIJIANG_SAME"));
    DIJIANG_TRY(check_pointers({{"packed", b.packed, 128, true}, {"embedding", b.embedding, 16, true},
                                {"embedding_scales", b.embedding_scales, 2, scaled},
                                {"position_embedding", b.position_embedding, 16, m.position_rows > 0},
                                {"input_ids", b.input_ids, static_cast<uintptr_t>(integer), true},
                                {"positions", b.positions, static_cast<uintptr_t>(integer), true},
                                {"seq_lens", b.seq_lens, static_cast<uintptr_t>(integer), true},
                                {"logits", b.logits, 4, true}, {"sync", b.sync, 128, true}}));
    if (b.states == nullptr)
        return fail(DIJIANG_INVALID_ARGUMENT, "states is missing; got NULL; expected a pointer for each layer");
    if (b.sync_size < static_cast<size_t>(plan.params.exchange.size))
        return fail(DIJIANG_INVALID_ARGUMENT, "sync is too small; got %zu bytes; expected %" PRId64, b.sync_size,
                    plan.params.exchange.size);
    if (state_stride < state || state_stride > kMostStride)
        return invalid_range("state_row_stride", state_stride, "a row's state or more, 0 for dense");
    if (logits_stride < m.vocabulary || logits_stride > kMostStride)
        return invalid_range("logits_row_stride", logits_stride, "the vocabulary or more, 0 for dense");
    std::vector<Region> regions = {
        dense("packed", b.packed, step::packed_bytes(layout), false),
        dense("embedding", b.embedding, embedding_bytes, false),
        dense("embedding_scales", b.embedding_scales, scaled ? elements / 16 : 0, false),
        dense("position_embedding", b.position_embedding, int64_t{2} * m.position_rows * m.hidden, false),
        dense("input_ids", b.input_ids, integer * rows, false),
        dense("positions", b.positions, integer * rows, false),
        dense("seq_lens", b.seq_lens, integer * rows, false),
        {"logits", reinterpret_cast<uintptr_t>(b.logits), int64_t{4} * m.vocabulary, rows, 4 * logits_stride, 1, 0, true},
        dense("sync", b.sync, plan.params.exchange.size, true),
    };
    for (int32_t layer = 0; layer < m.layers; ++layer) {
        DIJIANG_TRY(check_pointer("states[..]", b.states[layer], 4));
        regions.push_back({"states[..]", reinterpret_cast<uintptr_t>(b.states[layer]), 4 * state, rows, 4 * state_stride, 1,
                           0, true});
    }
    return check_apart(regions.data(), static_cast<int>(regions.size()));
}

dijiang_status run(const dijiang_step_model* model, const dijiang_step_buffers* b, cudaStream_t stream) {
    if (b == nullptr)
        return fail(DIJIANG_INVALID_ARGUMENT, "buffers is missing; got NULL; expected a dijiang_step_buffers");
    Plan plan;
    DIJIANG_TRY(plan_for(model, b->rows, nullptr, plan));
    if (b->integers != DIJIANG_INT32 && b->integers != DIJIANG_INT64)
        return invalid_range("integers", b->integers, "a dijiang_integers, 0 or 1");
    if (b->rows == 0) return DIJIANG_OK;
    step::Params& p = plan.params;
    const int64_t state = int64_t{model->num_heads} * model->head_dim * model->head_dim;
    p.state_row_stride = b->state_row_stride != 0 ? b->state_row_stride : state;
    p.logits_row_stride = b->logits_row_stride != 0 ? b->logits_row_stride : model->vocabulary;
    DIJIANG_TRY(check_buffers(*model, *b, plan, p.state_row_stride, p.logits_row_stride));
    p.integers = b->integers;
    p.packed = static_cast<const uint8_t*>(b->packed);
    p.embedding = b->embedding;
    p.embedding_scales = b->embedding_scales;
    p.position_embedding = b->position_embedding;
    p.input_ids = b->input_ids;
    p.positions = b->positions;
    p.seq_lens = b->seq_lens;
    for (int32_t layer = 0; layer < model->layers; ++layer) p.states[layer] = b->states[layer];
    p.logits = b->logits;
    p.sync = static_cast<uint8_t*>(b->sync);
    const cudaError_t error = step::launch(model->dtype, plan, stream);
    return error == cudaSuccess ? DIJIANG_OK : fail_cuda(error, "the step kernel");
}

}  // namespace
}  // namespace dijiang

using namespace dijiang;

dijiang_status dijiang_step_sizes(const dijiang_step_model* model, int32_t rows, const dijiang_device* device,
                                  dijiang_step_size* size) {
    return guarded([&] { return sizes(model, rows, device, size); });
}

dijiang_status dijiang_step_pack_layer(const dijiang_step_model* model, int32_t layer, const dijiang_step_layer* tensors,
                                       void* packed, size_t size, dijiang_stream stream) {
    return guarded([&] { return pack_layer(model, layer, tensors, packed, size, stream); });
}

dijiang_status dijiang_step_pack_matrix(const dijiang_step_model* model, int32_t layer, int32_t matrix, const void* values,
                                        const void* scales, void* packed, size_t size, dijiang_stream stream) {
    return guarded([&] { return pack_matrix(model, layer, matrix, values, scales, packed, size, stream); });
}

dijiang_status dijiang_step_pack_ends(const dijiang_step_model* model, const dijiang_step_ends* tensors, void* packed,
                                      size_t size, dijiang_stream stream) {
    return guarded([&] { return pack_ends(model, tensors, packed, size, stream); });
}

dijiang_status dijiang_step(const dijiang_step_model* model, const dijiang_step_buffers* buffers, dijiang_stream stream) {
    return guarded([&] { return run(model, buffers, stream); });
}
