// Needs no kernels, unlike the other attributes: what reads a plan's bytes is tested without them.
#include "step/attributes.h"

namespace dijiang::trt::step {

std::string take_formats(Attributes& attributes) {
    dijiang_step_model& m = attributes.model;
    const int32_t* const given = attributes.weight_formats;
    if (attributes.formats == 1 && given[0] == 0) return {};
    if (m.layers < 1 || m.layers > DIJIANG_STEP_MAX_LAYERS || attributes.formats != 2 + m.layers)
        return "weight_formats does not fit the model; got " + std::to_string(attributes.formats) +
               " values for " + std::to_string(m.layers) + " layers; expected 2 and one for each layer, or a single 0";
    m.quantised = 1;
    m.head_format = given[0];
    m.embedding_format = given[1];
    for (int32_t layer = 0; layer < m.layers; ++layer) {
        const int32_t matrices = given[2 + layer];
        if (matrices < 0 || matrices > UINT8_MAX)
            return "weight_formats is not possible; got " + std::to_string(matrices) + " for layer " +
                   std::to_string(layer) + "; expected a bit for each of its matrices";
        m.int8_matrices[layer] = static_cast<uint8_t>(matrices);
    }
    return {};
}

}  // namespace dijiang::trt::step
