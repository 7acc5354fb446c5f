#include "v2/step_blob.h"

#include "v2/bytes.h"

namespace dijiang::trt::step {
namespace {

constexpr uint32_t kMagic = 0x53544a44;  // "DJTS", first byte first
constexpr uint32_t kFormat = 1, kQuantisedFormat = 1 + DIJIANG_STEP_PACKING;
constexpr size_t kFormatsAt = 4 * (2 + kIntegers);
static_assert(kBlobSize == 4 * (3 + kIntegers + kReals), "every attribute is in the blob");

}  // namespace

void write_blob(const Attributes& attributes, unsigned char* bytes) {
    Writer writer(bytes);
    const int32_t formats = kept_formats(attributes);
    for (const uint32_t value : {kMagic, formats == 0 ? kFormat : kQuantisedFormat}) writer.integer(value);
    for (const int32_t* value : integers(attributes).at) writer.integer(*value);
    writer.integer(formats);
    for (const float* value : reals(attributes).at) writer.real(*value);
    for (int32_t i = 0; i < formats; ++i) writer.integer(attributes.weight_formats[i]);
}

std::string read_blob(const void* bytes, size_t size, Attributes& attributes) {
    if (bytes == nullptr || size < kBlobSize) return wrong_size(bytes, size, kBlobSize);
    const int32_t formats = Reader(static_cast<const unsigned char*>(bytes) + kFormatsAt, 4).integer();
    if (formats < 0 || formats > kMostFormats)
        return "the plan's data for this plugin counts " + std::to_string(formats) +
               " formats of weights; expected 0 to " + std::to_string(kMostFormats) + ": the plan is damaged";
    const size_t expected = kBlobSize + 4 * static_cast<size_t>(formats);
    if (size != expected) return wrong_size(bytes, size, expected);
    Reader reader(bytes, size);
    std::string wrong = reader.head(kMagic, size == kBlobSize ? kFormat : kQuantisedFormat);
    if (!wrong.empty()) return wrong;
    for (int32_t* value : integers(attributes).at) *value = reader.integer();
    reader.integer();  // formats
    for (float* value : reals(attributes).at) *value = reader.real();
    if (formats == 0) return {};
    attributes.formats = formats;
    for (int32_t i = 0; i < formats; ++i) attributes.weight_formats[i] = reader.integer();
    return take_formats(attributes);
}

}  // namespace dijiang::trt::step
