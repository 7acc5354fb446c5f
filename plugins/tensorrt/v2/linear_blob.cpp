#include "v2/linear_blob.h"

#include "v2/bytes.h"

namespace dijiang::trt::linear {
namespace {

constexpr uint32_t kMagic = 0x4c544a44;  // "DJTL", first byte first
constexpr uint32_t kFormat = 3;

// The arrays of four integers, in the blob's order.
template <typename A>
auto arrays(A& a) {
    struct {
        decltype(&a.term_output) at[8];
    } it{{&a.term_output, &a.term_bias, &a.output_activation, &a.output_norm, &a.output_norm_bias,
        &a.output_residual, &a.term_weight_format, &a.output_width}};
    return it;
}

}  // namespace

void write_blob(const Attributes& attributes, unsigned char* bytes) {
    Writer writer(bytes);
    for (const uint32_t value : {kMagic, kFormat}) writer.integer(value);
    for (const int32_t value : {attributes.terms, attributes.outputs, attributes.dtype, attributes.workspace})
        writer.integer(value);
    for (const auto* array : arrays(attributes).at)
        for (const int32_t value : *array) writer.integer(value);
    for (const float value : attributes.output_epsilon) writer.real(value);
}

std::string read_blob(const void* bytes, size_t size, Attributes& attributes) {
    if (bytes == nullptr || size != kBlobSize) return wrong_size(bytes, size, kBlobSize);
    Reader reader(bytes, size);
    std::string wrong = reader.head(kMagic, kFormat);
    if (!wrong.empty()) return wrong;
    for (int32_t* value : {&attributes.terms, &attributes.outputs, &attributes.dtype, &attributes.workspace})
        *value = reader.integer();
    for (auto* array : arrays(attributes).at)
        for (int32_t& value : *array) value = reader.integer();
    for (float& value : attributes.output_epsilon) value = reader.real();
    if (attributes.terms < 1 || attributes.terms > kMostTerms || attributes.outputs < 1 ||
        attributes.outputs > kMostOutputs)
        return "the plan's data for this plugin counts " + std::to_string(attributes.terms) + " terms and " +
               std::to_string(attributes.outputs) + " outputs; expected 1 to 4 of each: the plan is damaged";
    return {};
}

}  // namespace dijiang::trt::linear
