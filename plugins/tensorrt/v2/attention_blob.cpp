#include "v2/attention_blob.h"

#include "v2/bytes.h"

namespace dijiang::trt::attention {
namespace {

constexpr uint32_t kMagic = 0x41544a44;  // "DJTA", first byte first
constexpr uint32_t kFormat = 1;

}  // namespace

void write_blob(const Attributes& attributes, unsigned char* bytes) {
    Writer writer(bytes);
    for (const uint32_t value : {kMagic, kFormat}) writer.integer(value);
    for (const int32_t value :
        {attributes.num_heads, attributes.num_kv_heads, attributes.head_dim, attributes.rotary_dim})
        writer.integer(value);
    writer.real(attributes.epsilon);
    for (const int32_t value : {attributes.limits.max_batch, attributes.limits.max_length}) writer.integer(value);
}

std::string read_blob(const void* bytes, size_t size, Attributes& attributes) {
    if (bytes == nullptr || size != kBlobSize) return wrong_size(bytes, size, kBlobSize);
    Reader reader(bytes, size);
    std::string wrong = reader.head(kMagic, kFormat);
    if (!wrong.empty()) return wrong;
    for (int32_t* value :
        {&attributes.num_heads, &attributes.num_kv_heads, &attributes.head_dim, &attributes.rotary_dim})
        *value = reader.integer();
    attributes.epsilon = reader.real();
    Limits& limits = attributes.limits;
    for (int32_t* value : {&limits.max_batch, &limits.max_length}) *value = reader.integer();
    if (limits.max_batch < 0 || limits.max_length < 0)
        return "the plan's limits are negative: the plan is damaged";
    return {};
}

}  // namespace dijiang::trt::attention
