#include "linear/many/plan.h"

#include <algorithm>

#include "linear/many/product.h"
#include "linear/quantized/quantized.h"

namespace dijiang {
namespace many {
namespace {

int64_t whole(int64_t bytes) { return (bytes + 255) / 256 * 256; }

bool quantised(const dijiang_linear_call& call, int32_t term) { return quantized::format_of(call, term) != DIJIANG_SAME; }

bool gated(const dijiang_linear_call& call, int32_t output) {
    return call.outputs[output].activation == DIJIANG_SWIGLU;
}

// Bytes that an output element's widened weights take, over the terms.
int64_t weight_of(const dijiang_linear_call& call, const Output& output) {
    int64_t bytes = 0;
    for (int32_t t = output.term; t < output.term + output.terms; ++t)
        if (quantised(call, t)) bytes += 2 * int64_t{call.terms[t].inner};
    return bytes;
}

// The most columns of which there are at most `most` bytes, `each` a column.
int64_t fitting(int64_t most, int64_t each) {
    return each == 0 ? DIJIANG_LINEAR_MAX_SIZE : std::max(most / each / kColumns, int64_t{1}) * kColumns;
}

void cut_output(const dijiang_linear_call& call, int32_t o, Plan& plan) {
    const Output& it = plan.outputs[o];
    const int64_t width = call.outputs[o].width, weight = weight_of(call, it);
    const int64_t sum = it.direct ? 0 : 4 * int64_t{plan.rows_at_once};
    const int64_t most = std::min(fitting(kMostWeights, weight), fitting(kMostSums, sum));
    const int64_t count = (width + most - 1) / most;
    const int64_t columns = ((width + count - 1) / count + kColumns - 1) / kColumns * kColumns;
    plan.sums = std::max(plan.sums, std::min(sum * sums_stride(width), std::max(kMostSums, sum * kColumns)));
    plan.two_sums = plan.two_sums || gated(call, o);
    for (int64_t column = 0; column < width; column += columns)
        plan.groups.back().push_back({o, static_cast<int32_t>(column),
                                      static_cast<int32_t>(std::min(columns, width - column)), {-1, -1}});
}

// As many pieces in a group as have room together.
void group(const dijiang_linear_call& call, Plan& plan) {
    const std::vector<Piece> pieces = std::move(plan.groups.back());
    int64_t most = 0, all = 0;
    for (int32_t o = 0; o < call.output_count; ++o) {
        const int64_t weight = weight_of(call, plan.outputs[o]);
        all += weight * call.outputs[o].width;
        most = std::max(most, std::min<int64_t>(call.outputs[o].width, kColumns) * weight);
    }
    const int64_t room = std::min(all, std::max(kMostWeights, most));
    plan.weights = whole(room) + (all == 0 ? 0 : 256 * kMostJobs);  // each begins at a multiple of 256
    plan.groups.assign(1, {});
    int64_t used = 0, jobs = 0;
    for (Piece piece : pieces) {
        const Output& output = plan.outputs[piece.output];
        const int64_t bytes = weight_of(call, output) * piece.columns;
        if (bytes > 0 && (used + bytes > room || jobs + output.terms > kMostJobs)) {
            plan.groups.emplace_back();
            used = jobs = 0;
        }
        int64_t at = whole(used) + 256 * jobs;
        for (int32_t t = 0; t < output.terms; ++t)
            if (quantised(call, output.term + t)) {
                piece.weights[t] = at;
                at = whole(at + 2 * int64_t{call.terms[output.term + t].inner} * piece.columns);
                ++jobs;
            }
        used += bytes;
        plan.groups.back().push_back(piece);
    }
}

// Expected microseconds, as fitted to measurements on an H100 (docs/evidence/many-rows-h100.txt). Of the kernel that
// multiplies integers: for a chunk of K, with what each more block of a multiprocessor adds to that, up to the blocks
// that run there at once. Of cuBLASLt: for its launch and those around it, for a row, and for widening a million
// weights and reading them again.
constexpr float kChunkOfInt4 = 2.2f, kChunkOfInt8 = 1.25f, kEachBlock = 0.4f, kBlocksAtOnce = 3.0f;
constexpr float kLaunches = 7.0f, kEachRow = 0.05f, kMillionOfInt4 = 1.7f, kMillionOfInt8 = 1.95f;
constexpr int32_t kFewRows = 128;  // beyond, the kernel's blocks have too much to multiply

}  // namespace

bool pays(const dijiang_linear_call& call, const dijiang_device& device) {
    if (!quantised(call, 0) || call.rows > kFewRows) return true;
    for (int32_t o = 0; o < call.output_count; ++o)
        if (call.outputs[o].norm != DIJIANG_NORM_NONE) return true;  // that kernel has none
    quantized::Launch launch;
    if (quantized::cut(call, device, launch) != DIJIANG_OK || !launch.many) return true;
    float longest = 0.0f, widening = kLaunches + kEachRow * static_cast<float>(call.rows);
    for (int32_t o = 0; o < call.output_count; ++o) {
        const quantized::OutputCut& cut = launch.params.outputs[o];
        float chunks = 0.0f;
        for (int32_t t = cut.term; t < cut.term + cut.terms; ++t) {
            const bool four = launch.params.terms[t].format == DIJIANG_INT4;
            chunks += (four ? kChunkOfInt4 : kChunkOfInt8) * static_cast<float>(launch.params.terms[t].chunks);
            widening += (four ? kMillionOfInt4 : kMillionOfInt8) * 1e-6f * static_cast<float>(call.outputs[o].width) *
                        static_cast<float>(call.terms[t].inner);
        }
        longest = std::max(longest, chunks);
    }
    const float share = static_cast<float>(launch.blocks * launch.row_blocks) / static_cast<float>(device.multiprocessors);
    const float slower = (1.0f + kEachBlock * std::min(share, kBlocksAtOnce)) * std::max(share / kBlocksAtOnce, 1.0f);
    return widening < longest * slower;
}

Plan plan(const dijiang_linear_call& call, bool any_bias) {
    Plan it;
    it.rows_at_once = std::min(call.rows, kRowsAtOnce);
    it.groups.emplace_back();
    for (int32_t o = 0, term = 0; o < call.output_count; ++o) {
        Output& output = it.outputs[o];
        output.term = term;
        bool bias = false, rounded = true;
        for (; term < call.term_count && call.terms[term].output == o; ++term) {
            ++output.terms;
            bias = bias || call.terms[term].bias != nullptr;
            rounded = rounded && (call.rounded_biases >> term & 1) != 0;
        }
        const dijiang_linear_output& out = call.outputs[o];
        const bool plain = out.activation == DIJIANG_IDENTITY;
        const bool relu = out.activation == DIJIANG_RELU && out.residual == nullptr;
        const bool added = rounded && out.width % kEpilogueColumns == 0;
        output.direct = output.terms == 1 && !any_bias && ((plain && (!bias || added)) || (relu && added));
        output.bias = output.direct && bias ? it.biases : -1;
        if (output.bias >= 0 || any_bias) it.biases += whole(2 * int64_t{call.outputs[o].width});
        if (call.outputs[o].norm != DIJIANG_NORM_NONE)
            it.inputs = std::max(it.inputs, whole(2 * int64_t{it.rows_at_once} * call.terms[output.term].inner));
        cut_output(call, o, it);
    }
    it.sums = whole(it.sums);
    group(call, it);
    return it;
}

int64_t workspace(const dijiang_linear_call& call) { return call.rows < kLeastRows ? 0 : plan(call, true).bytes(); }

int64_t Plan::bytes() const {
    return static_cast<int64_t>(kLibraryWorkspace) + inputs + weights + biases + (two_sums ? 2 : 1) * sums;
}

std::string describe(const dijiang_linear_call& call, const Plan& plan) {
    size_t pieces = 0;
    for (const auto& of_group : plan.groups) pieces += of_group.size();
    const int64_t rounds = (call.rows + plan.rows_at_once - 1) / plan.rows_at_once;
    return "products many rows=" + std::to_string(plan.rows_at_once) + " rounds=" + std::to_string(rounds) +
           " pieces=" + std::to_string(pieces) + " widened=" + std::to_string(plan.groups.size()) +
           " workspace=" + std::to_string(plan.bytes());
}

}  // namespace many
}  // namespace dijiang
