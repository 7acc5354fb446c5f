#include "step/attributes.h"

#include <cstdio>

namespace dijiang::trt::step {
namespace {

// An H100, whose blocks have the most shared memory of all: it stands for the GPU where there is none.
constexpr dijiang_device kLargest = {90, 132, 227 << 10, 0};

std::string sizes(const Attributes& attributes, dijiang_step_size& size) {
    return dijiang_step_sizes(&attributes.model, attributes.rows, &kLargest, &size) == DIJIANG_OK
               ? std::string()
               : std::string(dijiang_last_error());
}

}  // namespace

std::string why_unsupported(const Attributes& attributes) {
    if (attributes.rows < 1 || attributes.rows > DIJIANG_STEP_MAX_ROWS)
        return "rows is out of range; got " + std::to_string(attributes.rows) + "; expected 1 to " +
               std::to_string(DIJIANG_STEP_MAX_ROWS);
    if (attributes.blocks < 1)
        return "blocks is out of range; got " + std::to_string(attributes.blocks) +
               "; expected what dijiang_step_sizes says for the device";
    dijiang_step_size size{};
    return sizes(attributes, size);
}

std::string packed_bytes(const Attributes& attributes, size_t& bytes) {
    dijiang_step_size size{};
    std::string wrong = sizes(attributes, size);
    bytes = size.packed;
    return wrong;
}

std::string describe(const Attributes& attributes) {
    std::string text;
    for (const int32_t* value : integers(attributes).at) text += std::to_string(*value) + " ";
    for (int32_t i = 0; i < attributes.formats; ++i) text += std::to_string(attributes.weight_formats[i]) + " ";
    for (const float* value : reals(attributes).at) {
        char number[40];
        std::snprintf(number, sizeof number, "%a ", static_cast<double>(*value));
        text += number;
    }
    return text;
}

}  // namespace dijiang::trt::step
