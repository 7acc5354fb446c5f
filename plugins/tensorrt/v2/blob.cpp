#include "blob.h"

#include <cstdint>
#include <cstring>

namespace dijiang::trt {
namespace {

constexpr uint32_t kMagic = 0x41544a44;  // "DJTA", first byte first
constexpr uint32_t kFormat = 1;

static_assert(sizeof(float) == sizeof(uint32_t), "epsilon travels as four bytes");

void put(unsigned char*& at, uint32_t value) {
    for (int byte = 0; byte < 4; ++byte) *at++ = static_cast<unsigned char>(value >> (8 * byte));
}

uint32_t take(const unsigned char*& at) {
    uint32_t value = 0;
    for (int byte = 0; byte < 4; ++byte) value |= static_cast<uint32_t>(*at++) << (8 * byte);
    return value;
}

}  // namespace

void write_blob(const Attributes& attributes, const Limits& limits, unsigned char* bytes) {
    uint32_t epsilon;
    std::memcpy(&epsilon, &attributes.epsilon, sizeof epsilon);
    for (const uint32_t value : {kMagic, kFormat, static_cast<uint32_t>(attributes.num_heads),
             static_cast<uint32_t>(attributes.num_kv_heads), static_cast<uint32_t>(attributes.head_dim),
             static_cast<uint32_t>(attributes.rotary_dim), epsilon, static_cast<uint32_t>(limits.max_batch),
             static_cast<uint32_t>(limits.max_length)}) {
        put(bytes, value);
    }
}

std::string read_blob(const void* bytes, size_t size, Attributes& attributes, Limits& limits) {
    if (bytes == nullptr || size != kBlobSize) {
        return "the plan keeps " + std::to_string(bytes == nullptr ? 0 : size) +
               " bytes for this plugin; expected " + std::to_string(kBlobSize) +
               ": the plan is damaged, or of another version of this plugin";
    }
    const auto* at = static_cast<const unsigned char*>(bytes);
    if (take(at) != kMagic)
        return "the plan's data for this plugin does not start with DJTA: the plan is damaged";
    if (const uint32_t format = take(at); format != kFormat) {
        return "the plan's data for this plugin has format " + std::to_string(format) +
               ", this plugin reads format " + std::to_string(kFormat) +
               ": build the engine again with this plugin";
    }
    const auto integer = [&at] { return static_cast<int32_t>(take(at)); };
    attributes.num_heads = integer();
    attributes.num_kv_heads = integer();
    attributes.head_dim = integer();
    attributes.rotary_dim = integer();
    const uint32_t epsilon = take(at);
    std::memcpy(&attributes.epsilon, &epsilon, sizeof epsilon);
    limits.max_batch = integer();
    limits.max_length = integer();
    if (limits.max_batch < 0 || limits.max_length < 0)
        return "the plan's limits are negative: the plan is damaged";
    return {};
}

}  // namespace dijiang::trt
