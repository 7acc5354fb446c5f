// The C ABI of products of few rows: check, cut, launch.
#include <cinttypes>
#include <cmath>
#include <cstdio>

#include "host/arguments.h"
#include "host/device.h"
#include "host/errors.h"
#include "linear/linear.h"
#include "linear/many/cublaslt.h"
#include "linear/many/run.h"
#include "linear/quantized/quantized.h"

namespace dijiang {
namespace {

constexpr int32_t kMostRows = 65535 * 8;  // grids have no more blocks of rows

dijiang_status check_number(const char* what, int32_t index, const char* field, double value, bool good,
                            const char* expected) {
    if (good) return DIJIANG_OK;
    return fail(DIJIANG_INVALID_ARGUMENT, "%s[%d].%s is out of range; got %g; expected %s", what, index, field, value,
                expected);
}

dijiang_status check_count(const char* field, int64_t value, int64_t least, int64_t most) {
    if (value >= least && value <= most) return DIJIANG_OK;
    return fail(DIJIANG_INVALID_ARGUMENT, "%s is out of range; got %" PRId64 "; expected %" PRId64 " to %" PRId64, field,
                value, least, most);
}

// All terms' formats are known, and all are of one kind: of T, or quantised.
dijiang_status check_formats(const dijiang_linear_call& call) {
    for (int32_t t = 0; t < DIJIANG_LINEAR_MAX_TERMS; ++t) {
        const int32_t format = quantized::format_of(call, t);
        const bool known = t < call.term_count ? format <= DIJIANG_INT4 : format == DIJIANG_SAME;
        DIJIANG_TRY(check_number("weight_formats", t, "format", format, known,
                                 "a dijiang_weight_format, 0 to 2, and 0 where there is no term"));
        if (t > 0 && t < call.term_count && (format == DIJIANG_SAME) != (quantized::format_of(call, 0) == DIJIANG_SAME))
            return fail(DIJIANG_UNSUPPORTED, "terms[%d] is quantised or not as terms[0] is not; expected one kind in a call", t);
    }
    return DIJIANG_OK;
}

dijiang_status check_output(const dijiang_linear_call& call, int32_t index, int32_t term, int32_t terms) {
    const dijiang_linear_output& out = call.outputs[index];
    const auto number = [index](const char* field, double value, bool good, const char* expected) {
        return check_number("outputs", index, field, value, good, expected);
    };
    DIJIANG_TRY(number("width", out.width, out.width >= 1 && out.width <= DIJIANG_LINEAR_MAX_SIZE, "1 to 2^20"));
    DIJIANG_TRY(number("activation", out.activation,
                       out.activation >= DIJIANG_IDENTITY && out.activation <= DIJIANG_SWIGLU,
                       "a dijiang_activation, 0 to 5"));
    DIJIANG_TRY(number("norm", out.norm, out.norm >= DIJIANG_NORM_NONE && out.norm <= DIJIANG_RMS_NORM,
                       "a dijiang_norm, 0 to 2"));
    if (terms < 1 || terms > 2 || (out.activation == DIJIANG_SWIGLU && terms != 2))
        return fail(DIJIANG_INVALID_ARGUMENT, "outputs[%d] has the wrong number of terms; got %d; expected %s", index,
                    terms, out.activation == DIJIANG_SWIGLU ? "2, for DIJIANG_SWIGLU" : "1 or 2");
    if (out.norm == DIJIANG_NORM_NONE) return DIJIANG_OK;
    DIJIANG_TRY(number("epsilon", out.epsilon, out.epsilon > 0 && std::isfinite(out.epsilon), "above 0"));
    const dijiang_linear_term* const t = call.terms + term;
    if (terms == 2 && (t[0].input != t[1].input || t[0].inner != t[1].inner))
        return fail(DIJIANG_INVALID_ARGUMENT,
                    "outputs[%d] has a norm, but its terms have different inputs; expected the same input", index);
    return DIJIANG_OK;
}

// Everything but pointers.
dijiang_status check_shape(const dijiang_linear_call& call) {
    DIJIANG_TRY(check_count("dtype (only 16-bit types have these kernels)", call.dtype, DIJIANG_FLOAT16, DIJIANG_BFLOAT16));
    DIJIANG_TRY(check_count("rows", call.rows, 0, kMostRows));
    DIJIANG_TRY(check_count("term_count", call.term_count, 1, DIJIANG_LINEAR_MAX_TERMS));
    DIJIANG_TRY(check_count("output_count", call.output_count, 1, DIJIANG_LINEAR_MAX_OUTPUTS));
    DIJIANG_TRY(check_count("constant_weights", call.constant_weights, 0, 1));
    DIJIANG_TRY(check_count("rounded_biases", call.rounded_biases, 0, (int64_t{1} << call.term_count) - 1));
    DIJIANG_TRY(check_count("reserved", call.reserved, 0, 0));
    DIJIANG_TRY(check_formats(call));
    int32_t last = 0;
    for (int32_t t = 0; t < call.term_count; ++t) {
        const dijiang_linear_term& term = call.terms[t];
        DIJIANG_TRY(check_number("terms", t, "inner", term.inner,
                                 term.inner > 0 && term.inner <= DIJIANG_LINEAR_MAX_SIZE &&
                                     term.inner % DIJIANG_LINEAR_INNER_STEP == 0,
                                 "a multiple of 32, 32 to 2^20"));
        DIJIANG_TRY(check_number("terms", t, "output", term.output, term.output >= last && term.output < call.output_count,
                                 "the index of an output, no less than that of the term before"));
        last = term.output;
    }
    int32_t term = 0;
    for (int32_t o = 0; o < call.output_count; ++o) {
        int32_t terms = 0;
        while (term + terms < call.term_count && call.terms[term + terms].output == o) ++terms;
        DIJIANG_TRY(check_output(call, o, term, terms));
        term += terms;
    }
    return DIJIANG_OK;
}

// Names such as terms[2].weight, which check_pointer and regions keep pointers to.
struct Name {
    char text[32];
    Name() : text{} {}
    void set(const char* what, int32_t index, const char* field) {
        std::snprintf(text, sizeof text, "%s[%d].%s", what, index, field);
    }
};

struct Tensors {
    static constexpr int kMost = 3 * DIJIANG_LINEAR_MAX_TERMS + 4 * DIJIANG_LINEAR_MAX_OUTPUTS + 1;
    Name names[kMost];
    Region regions[kMost];
    int count = 0;

    dijiang_status add(const char* what, int32_t index, const char* field, const void* pointer, int64_t bytes,
                       bool required, bool written) {
        names[count].set(what, index, field);
        const char* const name = names[count].text;
        if (pointer != nullptr || required) DIJIANG_TRY(check_pointer(name, pointer, 16));
        regions[count++] = dense(name, pointer, pointer == nullptr ? 0 : bytes, written);
        return DIJIANG_OK;
    }
};

int64_t weight_bytes(const dijiang_linear_call& call, int32_t index) {
    const dijiang_linear_term& term = call.terms[index];
    const int64_t width = call.outputs[term.output].width;
    const int32_t format = quantized::format_of(call, index);
    return format == DIJIANG_SAME ? 2 * width * term.inner : quantized::packed_bytes(format, width, term.inner);
}

// workspace: of `workspace_size` bytes; NULL if there is none.
dijiang_status check_pointers(const dijiang_linear_call& call, const void* workspace, int64_t workspace_size) {
    Tensors tensors;
    if (workspace != nullptr) {
        DIJIANG_TRY(check_pointer("workspace", workspace, 256));
        tensors.regions[tensors.count++] = dense("workspace", workspace, workspace_size, true);
    }
    const int64_t rows = call.rows;
    for (int32_t t = 0; t < call.term_count; ++t) {
        const dijiang_linear_term& term = call.terms[t];
        const int64_t width = call.outputs[term.output].width;
        DIJIANG_TRY(tensors.add("terms", t, "input", term.input, 2 * rows * term.inner, true, false));
        DIJIANG_TRY(tensors.add("terms", t, "weight", term.weight, weight_bytes(call, t), true, false));
        DIJIANG_TRY(tensors.add("terms", t, "bias", term.bias, 4 * width, false, false));
    }
    for (int32_t o = 0, term = 0; o < call.output_count; ++o) {
        const dijiang_linear_output& out = call.outputs[o];
        while (call.terms[term].output < o) ++term;
        const int64_t inner = call.terms[term].inner;
        const bool norm = out.norm != DIJIANG_NORM_NONE;
        if (!norm && (out.norm_weight != nullptr || out.norm_bias != nullptr))
            return fail(DIJIANG_INVALID_ARGUMENT, "outputs[%d] has no norm, but a norm's weight or bias; expected NULL", o);
        DIJIANG_TRY(tensors.add("outputs", o, "norm_weight", out.norm_weight, 4 * inner, norm, false));
        DIJIANG_TRY(tensors.add("outputs", o, "norm_bias", out.norm_bias, 4 * inner, false, false));
        DIJIANG_TRY(tensors.add("outputs", o, "residual", out.residual, 2 * rows * out.width, false, false));
        DIJIANG_TRY(tensors.add("outputs", o, "output", out.output, 2 * rows * out.width, true, true));
    }
    return check_apart(tensors.regions, tensors.count);
}

// By the kernels of this library alone.
dijiang_status enqueue(const dijiang_linear_call& call, const dijiang_device& device, cudaStream_t stream) {
    const bool overlap = can_overlap(device), half = call.dtype == DIJIANG_FLOAT16;
    cudaError_t error = cudaSuccess;
    if (quantized::format_of(call, 0) != DIJIANG_SAME) {
        quantized::Launch launch;
        DIJIANG_TRY(quantized::cut(call, device, launch));
        error = half ? quantized::launch_f16(launch, overlap, stream) : quantized::launch_bf16(launch, overlap, stream);
    } else {
        linear::Launch launch;
        DIJIANG_TRY(linear::cut(call, device, launch));
        error = half ? linear::launch_f16(launch, overlap, stream) : linear::launch_bf16(launch, overlap, stream);
    }
    return error == cudaSuccess ? DIJIANG_OK : fail_cuda(error, "the kernel of products");
}

dijiang_status check_call(const dijiang_linear_call* call) {
    if (call == nullptr)
        return fail(DIJIANG_INVALID_ARGUMENT, "call is missing; got NULL; expected a dijiang_linear_call");
    return check_shape(*call);
}

dijiang_status run(const dijiang_linear_call* call, void* workspace, size_t workspace_size, cudaStream_t stream) {
    DIJIANG_TRY(check_call(call));
    if (call->rows == 0) return DIJIANG_OK;
    const int64_t needed = workspace == nullptr ? 0 : many::workspace(*call);
    if (needed > 0 && workspace_size < static_cast<size_t>(needed))
        return fail(DIJIANG_INVALID_ARGUMENT, "workspace_size is too small; got %zu; expected %" PRId64 " bytes or more",
                    workspace_size, needed);
    DIJIANG_TRY(check_pointers(*call, needed > 0 ? workspace : nullptr, needed));
    dijiang_device device{};
    DIJIANG_TRY(current_device(device));
    if (needed > 0 && many::pays(*call, device)) {
        bool done = false;
        std::string why;
        DIJIANG_TRY(many::run(*call, workspace, can_overlap(device), stream, done, why));
        if (done) return DIJIANG_OK;
    }
    return enqueue(*call, device, stream);
}

dijiang_status workspace_size(const dijiang_linear_call* call, size_t* size) {
    DIJIANG_TRY(check_call(call));
    DIJIANG_TRY(check_pointer("size", size, alignof(size_t)));
    *size = static_cast<size_t>(many::workspace(*call));
    return DIJIANG_OK;
}

dijiang_status library_name(char* text, size_t size) {
    DIJIANG_TRY(check_text(text, size));
    std::string why;
    const cublaslt::Library* const library = cublaslt::find(why);
    if (library == nullptr)
        return fail(DIJIANG_UNSUPPORTED, "there is no cuBLASLt; got %s; expected libcublasLt.so.11 to 13 of CUDA, or "
                    "where DIJIANG_CUBLASLT says", why.c_str());
    std::snprintf(text, size, "%s %zu", library->name.c_str(), library->version);
    return DIJIANG_OK;
}

dijiang_status describe(const dijiang_linear_call* call, const dijiang_device* given, char* text, size_t size) {
    DIJIANG_TRY(check_call(call));
    if (size > 0) DIJIANG_TRY(check_text(text, size));
    dijiang_device device{};
    DIJIANG_TRY(given_or_current(given, device));
    dijiang_linear_call some = *call;
    if (some.rows == 0) some.rows = 1;
    std::string line;
    if (quantized::format_of(some, 0) != DIJIANG_SAME) {
        quantized::Launch launch;
        DIJIANG_TRY(quantized::cut(some, device, launch));
        line = quantized::describe(launch);
    } else {
        linear::Launch launch;
        DIJIANG_TRY(linear::cut(some, device, launch));
        line = linear::describe(launch);
    }
    if (size > 0) std::snprintf(text, size, "%s", line.c_str());
    return DIJIANG_OK;
}

}  // namespace
}  // namespace dijiang

using namespace dijiang;

dijiang_status dijiang_linear(const dijiang_linear_call* call, dijiang_stream stream) {
    return guarded([&] { return run(call, nullptr, 0, stream); });
}

dijiang_status dijiang_linear_workspace_size(const dijiang_linear_call* call, size_t* size) {
    return guarded([&] { return workspace_size(call, size); });
}

dijiang_status dijiang_linear_with_workspace(const dijiang_linear_call* call, void* workspace, size_t workspace_size,
                                             dijiang_stream stream) {
    return guarded([&] { return run(call, workspace, workspace_size, stream); });
}

dijiang_status dijiang_linear_library(char* text, size_t size) {
    return guarded([&] { return library_name(text, size); });
}

dijiang_status dijiang_linear_plan(const dijiang_linear_call* call, const dijiang_device* device, char* text,
                                   size_t size) {
    return guarded([&] { return describe(call, device, text, size); });
}
