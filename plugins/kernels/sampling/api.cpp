// The C ABI of sampling: check, fill in what was left at its default, launch.
#include <cinttypes>
#include <cmath>
#include <cstdio>

#include "host/arguments.h"
#include "host/device.h"
#include "host/errors.h"
#include "sampling/sampling.h"

namespace dijiang {
namespace {

int64_t words(int32_t vocabulary) { return (int64_t{vocabulary} + 31) / 32; }

int64_t integer_size(int32_t integers) { return integers == DIJIANG_INT64 ? 8 : 4; }

dijiang_status check_number(const char* name, double value, bool good, const char* expected) {
    if (good) return DIJIANG_OK;
    return fail(DIJIANG_INVALID_ARGUMENT, "%s is out of range; got %g; expected %s", name, value, expected);
}

dijiang_status check_options(const dijiang_sampling_options& o) {
    DIJIANG_TRY(check_number("temperature", o.temperature, o.temperature >= 0 && std::isfinite(o.temperature),
                             "0 or more"));
    DIJIANG_TRY(check_number("top_k", o.top_k, o.top_k >= 0, "0 (all) or more"));
    DIJIANG_TRY(check_number("top_p", o.top_p, o.top_p > 0 && o.top_p <= 1, "above 0, at most 1 (all)"));
    DIJIANG_TRY(check_number("min_p", o.min_p, o.min_p >= 0 && o.min_p <= 1, "0 (all) to 1"));
    DIJIANG_TRY(check_number("repetition_penalty", o.repetition_penalty,
                             o.repetition_penalty > 0 && std::isfinite(o.repetition_penalty),
                             "above 0; 1 is none"));
    return check_number("options.reserved", o.reserved, o.reserved == 0, "0");
}

dijiang_status check_rows(int32_t batch, int32_t vocabulary, int32_t integers) {
    DIJIANG_TRY(check_size(batch, 1));
    DIJIANG_TRY(check_number("vocabulary", vocabulary, vocabulary >= 1, "1 or more"));
    if (vocabulary > DIJIANG_MAX_VOCABULARY)
        return fail(DIJIANG_UNSUPPORTED,
                    "vocabulary is more than the kernels support; got %d; expected 1 to %d", vocabulary,
                    DIJIANG_MAX_VOCABULARY);
    return check_number("integers", integers, integers == DIJIANG_INT32 || integers == DIJIANG_INT64,
                        "0 (int32) or 1 (int64)");
}

// A row stride, 0 made `dense`.
dijiang_status check_row_stride(const char* name, int64_t width, int64_t dense_stride, int64_t& stride) {
    if (stride != 0 && (stride < width || stride > kMostStride))
        return fail(DIJIANG_INVALID_ARGUMENT,
                    "%s_row_stride is not possible; got %" PRId64 "; expected 0, or %" PRId64 " or more",
                    name, stride, width);
    if (stride == 0) stride = dense_stride;
    return DIJIANG_OK;
}

Region rows_of(const char* name, const void* pointer, int64_t width, int32_t batch, int64_t stride,
               bool written) {
    return {name,   reinterpret_cast<uintptr_t>(pointer), width, 1, 0, stride == 0 ? 1 : batch, stride,
            written};
}

struct Pointer {
    const char* name;
    const void* pointer;
    int64_t alignment;
    bool required;
};

template <size_t kCount>
dijiang_status check_pointers(const Pointer (&pointers)[kCount]) {
    for (const Pointer& it : pointers)
        if (it.required || it.pointer != nullptr)
            DIJIANG_TRY(check_pointer(it.name, it.pointer, static_cast<uintptr_t>(it.alignment)));
    return DIJIANG_OK;
}

dijiang_status check_sample(const dijiang_sampling_options* options, SampleParams& params) {
    dijiang_sample_buffers& b = params.buffers;
    DIJIANG_TRY(check_rows(b.batch, b.vocabulary, b.integers));
    DIJIANG_TRY(check_number("buffers.reserved", b.reserved, b.reserved == 0, "0"));
    params.options_per_row = b.row_options != nullptr;
    if (!params.options_per_row) {
        if (options == nullptr)
            return fail(DIJIANG_INVALID_ARGUMENT,
                        "options is missing; got NULL; expected options or row_options");
        DIJIANG_TRY(check_options(*options));
        params.options = *options;
        params.numbers = numbers_of(*options, b.vocabulary);
    }
    if (b.batch == 0) return DIJIANG_OK;
    const int64_t integer = integer_size(b.integers), words_of_row = words(b.vocabulary), batch = b.batch;
    const bool draws = !params.options_per_row && params.options.temperature > 0;
    DIJIANG_TRY(check_pointers({{"logits", b.logits, 4, true},
                                {"allowed", b.allowed, 4, false},
                                {"seen", b.seen, 4, false},
                                {"row_options", b.row_options, 8, false},
                                {"streams", b.streams, 8, false},
                                {"draws", b.draws, 8, draws},
                                {"tokens", b.tokens, integer, true},
                                {"row_status", b.row_status, 4, true}}));
    DIJIANG_TRY(check_row_stride("logits", b.vocabulary, b.vocabulary, b.logits_row_stride));
    DIJIANG_TRY(check_row_stride("allowed", words_of_row, 0, b.allowed_row_stride));
    DIJIANG_TRY(check_row_stride("seen", words_of_row, words_of_row, b.seen_row_stride));
    const Region regions[] = {
        rows_of("logits", b.logits, int64_t{4} * b.vocabulary, b.batch, 4 * b.logits_row_stride, false),
        rows_of("allowed", b.allowed, 4 * words_of_row, b.batch, 4 * b.allowed_row_stride, false),
        rows_of("seen", b.seen, 4 * words_of_row, b.batch, 4 * b.seen_row_stride, false),
        dense("row_options", b.row_options, batch * static_cast<int64_t>(sizeof(dijiang_sampling_options)),
              false),
        dense("streams", b.streams, 8 * batch, false),
        dense("draws", b.draws, 8 * batch, false),
        dense("tokens", b.tokens, integer * batch, true),
        dense("row_status", b.row_status, 4 * batch, true),
    };
    return check_apart(regions, sizeof regions / sizeof *regions);
}

dijiang_status check_advance(dijiang_advance_buffers& b) {
    DIJIANG_TRY(check_rows(b.batch, b.vocabulary, b.integers));
    DIJIANG_TRY(check_number("history_max", b.history_max, b.history_max >= 0, "0 or more"));
    DIJIANG_TRY(check_number("stop_count", b.stop_count, b.stop_count >= 0, "0 or more"));
    if (b.batch == 0) return DIJIANG_OK;
    const int64_t integer = integer_size(b.integers), words_of_row = words(b.vocabulary), batch = b.batch;
    const bool history = b.history != nullptr;
    DIJIANG_TRY(check_pointers({{"tokens", b.tokens, integer, true},
                                {"row_status", b.row_status, 4, false},
                                {"positions", b.positions, integer, false},
                                {"seq_lens", b.seq_lens, integer, b.positions != nullptr},
                                {"draws", b.draws, 8, false},
                                {"input_ids", b.input_ids, integer, false},
                                {"history", b.history, integer, false},
                                {"history_lens", b.history_lens, 4, history},
                                {"seen", b.seen, 4, false},
                                {"finished", b.finished, 4, true},
                                {"stop_ids", b.stop_ids, 4, b.stop_count > 0},
                                {"active", b.active, 4, false}}));
    if (history && b.history_max < 1)
        return fail(DIJIANG_INVALID_ARGUMENT,
                    "history_max is out of range; got 0 with history; expected 1 or more");
    DIJIANG_TRY(check_row_stride("history", b.history_max, b.history_max, b.history_row_stride));
    DIJIANG_TRY(check_row_stride("seen", words_of_row, words_of_row, b.seen_row_stride));
    const int64_t row = integer * b.history_max;
    const Region regions[] = {
        dense("tokens", b.tokens, integer * batch, false),
        dense("input_ids", b.input_ids, integer * batch, true),
        dense("row_status", b.row_status, 4 * batch, false),
        dense("positions", b.positions, integer * batch, true),
        dense("seq_lens", b.seq_lens, integer * batch, true),
        dense("draws", b.draws, 8 * batch, true),
        rows_of("history", b.history, row, b.batch, integer * b.history_row_stride, true),
        dense("history_lens", b.history_lens, 4 * batch, true),
        rows_of("seen", b.seen, 4 * words_of_row, b.batch, 4 * b.seen_row_stride, true),
        dense("finished", b.finished, 4 * batch, true),
        dense("stop_ids", b.stop_ids, int64_t{4} * b.stop_count, false),
        dense("active", b.active, 4, true),
    };
    const bool in_place = b.input_ids == b.tokens;
    return check_apart(regions, sizeof regions / sizeof *regions, in_place ? 0 : -1, in_place ? 1 : -1);
}

SampleNeeds needs_of(const SampleParams& params) {
    if (params.options_per_row) return {false, true, 0};
    const dijiang_sampling_options& o = params.options;
    const int32_t top_k = o.top_k < params.buffers.vocabulary ? o.top_k : 0;
    return {o.temperature == 0, o.temperature != 0 && (top_k > 0 || o.top_p < 1), top_k};
}

dijiang_status sample(const dijiang_sampling_options* options, const dijiang_sample_buffers* buffers,
                      cudaStream_t stream) {
    if (buffers == nullptr)
        return fail(DIJIANG_INVALID_ARGUMENT,
                    "buffers is missing; got NULL; expected a dijiang_sample_buffers");
    SampleParams params{};
    params.buffers = *buffers;
    DIJIANG_TRY(check_sample(options, params));
    if (buffers->batch == 0) return DIJIANG_OK;
    dijiang_device device{};
    DIJIANG_TRY(current_device(device));
    const SampleNeeds needs = needs_of(params);
    SampleTeams teams{};
    cudaError_t error = sample_teams(device, teams);
    if (error != cudaSuccess) return fail_cuda(error, "asking CUDA about clusters of sampling");
    const SampleCut cut = cut_sample(buffers->batch, buffers->vocabulary, device, teams, needs);
    error = launch_sample(params, cut, device, can_overlap(device), stream);
    return error == cudaSuccess ? DIJIANG_OK : fail_cuda(error, "the sampling kernel");
}

dijiang_status advance(const dijiang_advance_buffers* buffers, cudaStream_t stream) {
    if (buffers == nullptr)
        return fail(DIJIANG_INVALID_ARGUMENT,
                    "buffers is missing; got NULL; expected a dijiang_advance_buffers");
    dijiang_advance_buffers filled = *buffers;
    DIJIANG_TRY(check_advance(filled));
    if (filled.batch == 0) return DIJIANG_OK;
    dijiang_device device{};
    DIJIANG_TRY(current_device(device));
    const cudaError_t error = launch_advance(filled, stream);
    return error == cudaSuccess ? DIJIANG_OK : fail_cuda(error, "the advance kernel");
}

}  // namespace
}  // namespace dijiang

using namespace dijiang;

dijiang_status dijiang_sample(const dijiang_sampling_options* options, const dijiang_sample_buffers* buffers,
                              dijiang_stream stream) {
    return guarded([&] { return sample(options, buffers, stream); });
}

dijiang_status dijiang_sample_plan(int32_t batch, int32_t vocabulary, const dijiang_device* device,
                                   char* text, size_t size) {
    return guarded([&]() -> dijiang_status {
        DIJIANG_TRY(check_rows(batch, vocabulary, DIJIANG_INT32));
        DIJIANG_TRY(check_text(text, size));
        dijiang_device known{};
        DIJIANG_TRY(given_or_current(device, known));
        SampleTeams teams = SampleTeams::guess(known);
        if (device == nullptr) {
            const cudaError_t error = sample_teams(known, teams);
            if (error != cudaSuccess) return fail_cuda(error, "asking CUDA about clusters of sampling");
        }
        const SampleCut cut = cut_sample(batch, vocabulary, known, teams, {false, true, 0});
        std::snprintf(text, size, "sample threads=%d team=%d ctas=%d ids_per_warp=%d staged=%d", cut.threads,
                      cut.team, batch * cut.team, cut.per_warp,
                      cut.staging > 0 ? cut.threads / 8 * cut.per_warp : 0);
        return DIJIANG_OK;
    });
}

dijiang_status dijiang_advance(const dijiang_advance_buffers* buffers, dijiang_stream stream) {
    return guarded([&] { return advance(buffers, stream); });
}
