#include "v2/step_blob.h"

#include "v2/bytes.h"

namespace dijiang::trt::step {
namespace {

constexpr uint32_t kMagic = 0x53544a44;  // "DJTS", first byte first
constexpr uint32_t kFormat = 1;
static_assert(kBlobSize == 4 * (2 + kIntegers + kReals), "every attribute is in the blob");

}  // namespace

void write_blob(const Attributes& attributes, unsigned char* bytes) {
    Writer writer(bytes);
    for (const uint32_t value : {kMagic, kFormat}) writer.integer(value);
    for (const int32_t* value : integers(attributes).at) writer.integer(*value);
    for (const float* value : reals(attributes).at) writer.real(*value);
}

std::string read_blob(const void* bytes, size_t size, Attributes& attributes) {
    if (bytes == nullptr || size != kBlobSize) return wrong_size(bytes, size, kBlobSize);
    Reader reader(bytes, size);
    std::string wrong = reader.head(kMagic, kFormat);
    if (!wrong.empty()) return wrong;
    for (int32_t* value : integers(attributes).at) *value = reader.integer();
    for (float* value : reals(attributes).at) *value = reader.real();
    return {};
}

}  // namespace dijiang::trt::step
