#include "linear/attributes.h"

#include <cstdio>

namespace dijiang::trt::linear {
namespace {

std::string wrong_flags(const char* name, const int32_t* values, int32_t count, int32_t most) {
    for (int32_t i = 0; i < count; ++i)
        if (values[i] < 0 || values[i] > most)
            return std::string(name) + " is not possible; got " + std::to_string(values[i]) + "; expected 0 " +
                   (most == 1 ? "or 1" : "to " + std::to_string(most));
    return {};
}

}  // namespace

dijiang_device reference_device() { return {80, 108, 163 * 1024, 0}; }

dijiang_linear_call call_of(const Attributes& attributes) {
    dijiang_linear_call call{};
    call.dtype = attributes.dtype;
    call.term_count = attributes.terms;
    call.output_count = attributes.outputs;
    // What names weights, biases and norms is constant in an engine; see Layer.
    call.constant_weights = 1;
    for (int32_t t = 0; t < attributes.terms; ++t) {
        const int32_t format = attributes.term_weight_format[t];
        call.terms[t].output = attributes.term_output[t];
        call.rounded_biases |= (attributes.term_bias[t] == kRoundedBias ? 1u : 0u) << t;
        call.weight_formats |= static_cast<uint32_t>(is_stored(format) ? format - 2 : format) << (8 * t);
    }
    for (int32_t o = 0; o < attributes.outputs; ++o) {
        call.outputs[o].activation = attributes.output_activation[o];
        call.outputs[o].norm = attributes.output_norm[o];
        call.outputs[o].epsilon = attributes.output_epsilon[o];
    }
    return call;
}

std::string why_unsupported(const Attributes& attributes) {
    const struct {
        const char* name;
        const int32_t* values;
        int32_t count, most;
    } flags[] = {{"term_bias", attributes.term_bias, attributes.terms, kRoundedBias},
        {"output_norm_bias", attributes.output_norm_bias, attributes.outputs, 1},
        {"output_residual", attributes.output_residual, attributes.outputs, 1}};
    for (const auto& it : flags) {
        std::string wrong = wrong_flags(it.name, it.values, it.count, it.most);
        if (!wrong.empty()) return wrong;
    }
    if (attributes.workspace != 0 && attributes.workspace != kReserved)
        return "workspace is not possible; got " + std::to_string(attributes.workspace) +
               "; expected 0 or 1: the plan was built by a newer plugin";
    for (int32_t o = 0; o < attributes.outputs; ++o)
        if (attributes.output_norm[o] == DIJIANG_NORM_NONE && attributes.output_norm_bias[o] != 0)
            return "output_norm_bias is 1 where output_norm is 0; expected 0";
    for (int32_t t = 0; t < attributes.terms; ++t) {
        const int32_t format = attributes.term_weight_format[t];
        if (format < 0 || format > kStoredInt4)
            return "term_weight_format is not possible; got " + std::to_string(format) + "; expected 0 to 4";
        const int32_t output = attributes.term_output[t];
        const bool packed = format == DIJIANG_INT8 || format == DIJIANG_INT4;
        if (output >= 0 && output < attributes.outputs && packed != (attributes.output_width[output] > 0))
            return "output_width is not possible; got " + std::to_string(attributes.output_width[output]) +
                   "; expected N where weights are packed, else 0";
    }
    // The kernels know the rest. A plugin is also created before its sizes are known.
    const dijiang_device device = reference_device();
    dijiang_linear_call call = call_of(attributes);
    call.rows = 1;
    for (dijiang_linear_term& term : call.terms) term.inner = DIJIANG_LINEAR_INNER_STEP;
    for (dijiang_linear_output& output : call.outputs) output.width = 1;
    return dijiang_linear_plan(&call, &device, nullptr, 0) == DIJIANG_OK ? "" : dijiang_last_error();
}

std::string describe(const Attributes& attributes) {
    std::string text = "dtype=" + std::to_string(attributes.dtype) + " workspace=" + std::to_string(attributes.workspace);
    for (int32_t t = 0; t < attributes.terms; ++t)
        text += " term=" + std::to_string(attributes.term_output[t]) + "," + std::to_string(attributes.term_bias[t]) + "," +
                std::to_string(attributes.term_weight_format[t]);
    for (int32_t o = 0; o < attributes.outputs; ++o) {
        char epsilon[40];
        std::snprintf(epsilon, sizeof epsilon, "%a", static_cast<double>(attributes.output_epsilon[o]));
        text += " output=" + std::to_string(attributes.output_activation[o]) + "," +
                std::to_string(attributes.output_norm[o]) + "," + std::to_string(attributes.output_norm_bias[o]) + "," +
                std::to_string(attributes.output_residual[o]) + "," + std::to_string(attributes.output_width[o]) + "," +
                epsilon;
    }
    return text;
}

}  // namespace dijiang::trt::linear
