// Does a model fit one launch on a device, and how is it cut?
#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <iterator>

#include "host/arguments.h"
#include "host/errors.h"
#include "step/step.h"

namespace dijiang {
namespace step {
namespace {

constexpr int32_t kMostHidden = 1 << 20;
// Pieces of weights that a block asks for at most: while it waits for others, and else, where the ring holds a good part of a
// layer and where it does not. Of what was tried on an H100 the fastest at the 410M and the 2.8B shape.
constexpr int kFlight = 2, kFlightBusy = 3, kFlightBusyLarge = 8;
constexpr int kLeastSlots = 2;
// The same of quantised weights' rounds, of 18.4 KB at most.
constexpr int kRoundsFlight = 1, kRoundsFlightBusy = 3, kLeastRounds = 3;

dijiang_status check_number(const char* name, double value, bool good, const char* expected) {
    if (good) return DIJIANG_OK;
    return fail(DIJIANG_INVALID_ARGUMENT, "%s is out of range; got %g; expected %s", name, value, expected);
}

dijiang_status check_formats(const dijiang_step_model& m) {
    const bool quantised = m.quantised != 0;
    const auto known = [](int32_t format) { return format == DIJIANG_INT8 || format == DIJIANG_INT4; };
    DIJIANG_TRY(check_number("quantised", m.quantised, m.quantised == 0 || m.quantised == 1, "0 or 1"));
    DIJIANG_TRY(check_number("head_format", m.head_format, quantised ? known(m.head_format) : m.head_format == DIJIANG_SAME,
                             quantised ? "DIJIANG_INT8 or DIJIANG_INT4" : "DIJIANG_SAME, as weights are not quantised"));
    DIJIANG_TRY(check_number("embedding_format", m.embedding_format,
                             m.embedding_format == DIJIANG_SAME || (quantised && known(m.embedding_format)),
                             quantised ? "DIJIANG_SAME, DIJIANG_INT8 or DIJIANG_INT4" : "DIJIANG_SAME, as weights are not quantised"));
    for (int layer = 0; layer < DIJIANG_STEP_MAX_LAYERS; ++layer)
        DIJIANG_TRY(check_number("int8_matrices", m.int8_matrices[layer],
                                 m.int8_matrices[layer] == 0 || (quantised && layer < m.layers),
                                 "0 where there is no layer, or weights are not quantised"));
    return check_number("reserved", m.reserved, m.reserved == 0, "0");
}

dijiang_status check_model(const dijiang_step_model& m) {
    const auto size = [](int32_t value) { return value > 0 && value <= kMostHidden && value % kChunk == 0; };
    DIJIANG_TRY(check_number("layers", m.layers, m.layers >= 1 && m.layers <= DIJIANG_STEP_MAX_LAYERS, "1 to 128"));
    DIJIANG_TRY(check_number("hidden", m.hidden, size(m.hidden), "a multiple of 32, 32 to 2^20"));
    DIJIANG_TRY(check_number("inner", m.inner, size(m.inner), "a multiple of 32, 32 to 2^20"));
    DIJIANG_TRY(check_number("vocabulary", m.vocabulary, m.vocabulary >= 1 && m.vocabulary <= DIJIANG_MAX_VOCABULARY,
                             "1 to 2^24"));
    DIJIANG_TRY(check_number("num_heads", m.num_heads, m.num_heads >= 1 && m.num_heads <= DIJIANG_MAX_HEADS, "1 to 256"));
    DIJIANG_TRY(check_number("num_kv_heads", m.num_kv_heads, m.num_kv_heads >= 1 && m.num_heads % m.num_kv_heads == 0,
                             "a divisor of num_heads"));
    DIJIANG_TRY(check_number("head_dim", m.head_dim, m.head_dim >= 16 && m.head_dim <= 256 && m.head_dim % 16 == 0,
                             "a multiple of 16 in 16 to 256"));
    DIJIANG_TRY(check_number("num_heads * head_dim", m.num_heads * m.head_dim, m.num_heads * m.head_dim % kChunk == 0,
                             "a multiple of 32"));
    DIJIANG_TRY(check_number("rotary_dim", m.rotary_dim,
                             m.rotary_dim >= 0 && m.rotary_dim <= m.head_dim && m.rotary_dim % 2 == 0,
                             "even, 0 to head_dim"));
    DIJIANG_TRY(check_number("dtype", m.dtype, m.dtype == DIJIANG_FLOAT16 || m.dtype == DIJIANG_BFLOAT16,
                             "DIJIANG_FLOAT16 or DIJIANG_BFLOAT16"));
    DIJIANG_TRY(check_number("norm", m.norm, m.norm == DIJIANG_LAYER_NORM || m.norm == DIJIANG_RMS_NORM,
                             "DIJIANG_LAYER_NORM or DIJIANG_RMS_NORM"));
    DIJIANG_TRY(check_number("activation", m.activation, m.activation >= DIJIANG_IDENTITY && m.activation <= DIJIANG_SWIGLU,
                             "a dijiang_activation, 0 to 5"));
    DIJIANG_TRY(check_number("parallel_residual", m.parallel_residual, m.parallel_residual == 0 || m.parallel_residual == 1,
                             "0 or 1"));
    DIJIANG_TRY(check_number("table_rows", m.table_rows, m.table_rows >= 0 && m.table_rows <= kMostHidden, "0 to 2^20"));
    DIJIANG_TRY(check_number("position_rows", m.position_rows, m.position_rows >= 0, "0 or more"));
    DIJIANG_TRY(check_number("position_offset", m.position_offset, m.position_offset >= 0 && m.position_offset <= kMostHidden,
                             "0 to 2^20"));
    DIJIANG_TRY(check_number("norm_epsilon", m.norm_epsilon, m.norm_epsilon > 0 && std::isfinite(m.norm_epsilon), "above 0"));
    DIJIANG_TRY(check_number("group_norm_epsilon", m.group_norm_epsilon,
                             m.group_norm_epsilon > 0 && std::isfinite(m.group_norm_epsilon), "above 0"));
    return check_formats(m);
}

int64_t most_units(const Layout& layout, int matrix) {
    return (int64_t{layout.groups(matrix)} + layout.blocks - 1) / layout.blocks * layout.chunks(matrix);
}
// What the slowest block streams of a layer, in units.
int64_t layer_units(const Layout& layout) {
    int64_t sum = 0;
    for (int m = kAttention; m <= kDense; ++m) sum += most_units(layout, m);
    return sum;
}
// And of all layers and the head.
int64_t longest(Layout layout, int blocks) {
    layout.blocks = blocks;
    return layout.layers * layer_units(layout) + most_units(layout, kHead);
}

// And in bytes, of quantised weights of the largest layer, as if the blocks had equally many.
int64_t layer_bytes(const Layout& layout) {
    if (!layout.quantised) return layer_units(layout) * kUnitBytes;
    int64_t most = 0;
    for (int l = 0; l < layout.layers; ++l) most = std::max(most, layer_begin(layout, l + 1) - layer_begin(layout, l));
    return most / layout.blocks;
}

// As few blocks as are about as fast as all of them.
int choose_blocks(const Layout& layout, const dijiang_device& device) {
    int64_t least = longest(layout, 1);
    for (int blocks = 2; blocks <= device.multiprocessors; ++blocks) least = std::min(least, longest(layout, blocks));
    int blocks = 1;
    while (longest(layout, blocks) > least + least / 100) ++blocks;
    return blocks;
}

// As many blocks for each head as there are, each with an even number of columns that divide a warp if possible.
int choose_splits(const Layout& layout) {
    int best = 1;
    for (int splits = 1; splits <= layout.head_dim / 4; ++splits)
        if (layout.head_dim % splits == 0 && layout.head_dim / splits % 4 == 0 && layout.heads * splits <= layout.blocks)
            best = splits;
    return best;
}

// Hands out places in a run of memory.
template <typename Integer> class Places {
public:
    explicit Places(Integer begin) : end_(begin) {}
    Integer take(int64_t bytes) {
        const Integer place = end_;
        end_ = static_cast<Integer>((place + bytes + 127) / 128 * 128);
        return place;
    }
    Integer end() const { return end_; }

private:
    Integer end_;
};

bool power_of_two(int x) { return x > 0 && (x & (x - 1)) == 0; }

// Everything in shared memory but the ring; size is where the ring may begin.
void place_memory(const Params& p, int rows, Memory& memory) {
    const Layout& layout = p.layout;
    const int64_t r = rows, hidden = layout.hidden, inner = layout.inner, width = layout.width(), d = layout.head_dim;
    const auto padded = [&](int64_t columns) { return layout.quantised ? std::max<int64_t>(columns, kMostBlocks * kChunk) : columns; };
    memory.padded = padded(std::min({hidden, inner, width})) > std::min({hidden, inner, width});
    Places<int32_t> places(kHeader);
    // The residual stream and the MLP's inner values are never there at the same time.
    const int32_t begin = places.end();
    memory.x1 = places.take(2 * r * padded(hidden));
    memory.x2 = layout.parallel ? places.take(2 * r * padded(hidden)) : memory.x1;
    memory.raw = places.take(4 * r * hidden);
    Places<int32_t> others(memory.padded ? places.end() : begin);
    memory.up = others.take(2 * r * padded(inner));
    memory.attended = others.take(2 * r * padded(width));
    const bool in_lanes = layout.heads >= 2 && layout.heads <= 64 && power_of_two(layout.heads);
    memory.outputs = others.take(in_lanes ? 0 : 4 * r * width);
    memory.gates = others.take(in_lanes ? 0 : 2 * r * width);
    Places<int32_t> rest(std::max(places.end(), others.end()));
    memory.sums = rest.take(4 * int64_t{kWarps} * kBatch * r * kGroup);
    memory.own = rest.take(4 * r * kGroup * ((layout.groups(kDown) + layout.blocks - 1) / layout.blocks));
    memory.statistics = rest.take(8 * r * kWarps);
    memory.means = rest.take(4 * r);
    memory.rotary = rest.take(8 * r * (layout.rotary_dim / 2));
    memory.turned = rest.take(int64_t{2} * 2 * Constants::proj_chunks(layout) * 2 * r * kChunk);
    memory.features = rest.take(4 * 2 * r * d);
    memory.values = rest.take(4 * r * p.columns);
    memory.opened = rest.take(2 * r * p.columns);
    memory.terms = rest.take(4 * 3 * r);
    memory.readout = rest.take(4 * r * p.entries * p.columns);
    memory.ring = rest.end();
}

void place_exchange(const Layout& layout, Exchange& exchange) {
    const int64_t r = DIJIANG_STEP_MAX_ROWS;
    Places<int64_t> places(128);
    exchange.hidden = places.take(8 * r * layout.hidden);
    exchange.qkvg = places.take(8 * r * (layout.qkv() + layout.width()));
    exchange.up = places.take(8 * r * layout.inner / 2);
    exchange.attention = places.take(16 * r * layout.width() / 2);
    exchange.size = places.end();
}

}  // namespace

dijiang_status make_plan(const dijiang_step_model& m, int32_t rows, const dijiang_device& device, Plan& plan) {
    DIJIANG_TRY(check_model(m));
    DIJIANG_TRY(check_number("rows", rows, rows >= 0 && rows <= DIJIANG_STEP_MAX_ROWS, "0 to 8"));
    if (device.compute_capability < 80)
        return fail(DIJIANG_UNSUPPORTED,
                    "a step in one launch needs asynchronous copies; got compute capability %d.%d; expected 8.0 or newer",
                    device.compute_capability / 10, device.compute_capability % 10);
    plan = {};
    Params& p = plan.params;
    p.layout = {m.layers, m.hidden, m.inner, m.vocabulary, m.num_heads, m.num_kv_heads, m.head_dim, m.rotary_dim,
                m.activation == DIJIANG_SWIGLU, m.parallel_residual, m.table_rows, 1, m.quantised,
                m.head_format == DIJIANG_INT8, {}};
    std::copy(std::begin(m.int8_matrices), std::end(m.int8_matrices), p.layout.int8);
    p.layout.blocks = choose_blocks(p.layout, device);
    p.places = Constants(p.layout);
    p.constants = constants_begin(p.layout);
    p.ends = ends_begin(p.layout);
    p.norm = m.norm;
    p.activation = m.activation;
    p.position_rows = m.position_rows;
    p.position_offset = m.position_offset;
    p.norm_epsilon = m.norm_epsilon;
    p.group_norm_epsilon = m.group_norm_epsilon;
    p.inverse_hidden = 1.0f / static_cast<float>(m.hidden);
    p.inverse_heads = 1.0f / static_cast<float>(m.num_heads);
    p.rows = rows;
    p.splits = choose_splits(p.layout);
    p.columns = m.head_dim / p.splits;
    p.sets = kThreads / p.columns;
    p.by_splits = inverse_of(p.splits);
    p.by_columns = inverse_of(p.columns);
    p.by_taken = inverse_of(m.head_dim + p.columns);
    p.by_fours = inverse_of(m.inner / 4);
    p.embedding_format = m.embedding_format;
    p.by_sharing = inverse_of(m.num_heads / m.num_kv_heads);
    p.entries = p.columns <= 32 && power_of_two(p.columns) ? kWarps : p.sets;
    place_exchange(p.layout, p.exchange);
    plan.capacity = 1;
    while (plan.capacity < rows) plan.capacity *= 2;
    place_memory(p, plan.capacity, p.memory);
    const Memory& at = p.memory;
    p.int8_bits[kUp] = 1u << DIJIANG_STEP_UP | (p.layout.gated ? 1u << DIJIANG_STEP_MLP_GATE : 0u);
    p.int8_bits[kDown] = 1u << DIJIANG_STEP_DOWN;
    p.int8_bits[kDense] = 1u << DIJIANG_STEP_DENSE;
    p.int8_bits[kHead] = ~0u;
    const int32_t inputs[] = {at.x1, m.parallel_residual ? at.x2 : at.x1, at.up, at.attended, at.x1};
    const int64_t biases[] = {p.places.attention_bias, p.places.up_bias, p.places.down_bias, p.places.dense_bias, 0};
    for (int matrix = 0; matrix < kMatrices; ++matrix) {
        p.inputs[matrix] = inputs[matrix];
        p.biases[matrix] = static_cast<int32_t>(biases[matrix]);
    }
    const int slot = m.quantised ? kRoundBytes : kSlotBytes, least = m.quantised ? kLeastRounds : kLeastSlots;
    p.slots = std::min(m.quantised ? kMostRounds : kMostSlots, (device.shared_memory - p.memory.ring) / slot);
    if (p.slots < least)
        return fail(DIJIANG_UNSUPPORTED,
                    "the step of that many rows does not fit a block's shared memory; got %d rows, %d bytes beside the "
                    "weights; expected at most %d",
                    rows, p.memory.ring, device.shared_memory - least * slot);
    p.memory.size = p.memory.ring + p.slots * slot;
    const bool small = layer_bytes(p.layout) <= int64_t{2} * p.slots * slot;
    p.flight = m.quantised ? kRoundsFlight : kFlight;
    p.flight_busy = m.quantised ? kRoundsFlightBusy : small ? kFlightBusy : kFlightBusyLarge;
    // Never more than the ring has, or who copies would wait for a slot's last filling but one, which its barrier has forgotten.
    p.flight_busy = std::min(p.flight_busy, p.slots * (m.quantised ? 1 : kPieces));
    return DIJIANG_OK;
}

cudaError_t launch(int32_t dtype, const Plan& plan, cudaStream_t stream) {
    constexpr int kHalf = DIJIANG_FLOAT16, kOther = DIJIANG_BFLOAT16;
    const bool half = dtype == DIJIANG_FLOAT16;
    if (plan.params.layout.quantised) {
        switch (plan.capacity) {
            case 1: return half ? launch_quantised<kHalf, 1>(plan, stream) : launch_quantised<kOther, 1>(plan, stream);
            case 2: return half ? launch_quantised<kHalf, 2>(plan, stream) : launch_quantised<kOther, 2>(plan, stream);
            case 4: return half ? launch_quantised<kHalf, 4>(plan, stream) : launch_quantised<kOther, 4>(plan, stream);
            default: return half ? launch_quantised<kHalf, 8>(plan, stream) : launch_quantised<kOther, 8>(plan, stream);
        }
    }
    switch (plan.capacity) {
        case 1: return half ? launch<kHalf, 1>(plan, stream) : launch<kOther, 1>(plan, stream);
        case 2: return half ? launch<kHalf, 2>(plan, stream) : launch<kOther, 2>(plan, stream);
        case 4: return half ? launch<kHalf, 4>(plan, stream) : launch<kOther, 4>(plan, stream);
        default: return half ? launch<kHalf, 8>(plan, stream) : launch<kOther, 8>(plan, stream);
    }
}

}  // namespace step
}  // namespace dijiang
