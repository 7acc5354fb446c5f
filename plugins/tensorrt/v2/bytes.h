// Little-endian bytes, whatever the machine: how a TensorRT 8.6 plan keeps plugins. No TensorRT header here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

namespace dijiang::trt {

static_assert(sizeof(float) == sizeof(uint32_t), "a float32 travels as four bytes");

// Writes to memory that is large enough.
class Writer {
public:
    explicit Writer(unsigned char* bytes) : at_(bytes) {}

    template <typename Integer>
    void integer(Integer number) {
        const uint32_t value = static_cast<uint32_t>(number);
        for (int byte = 0; byte < 4; ++byte) *at_++ = static_cast<unsigned char>(value >> (8 * byte));
    }
    void real(float number) {
        uint32_t value;
        std::memcpy(&value, &number, sizeof value);
        integer(value);
    }

private:
    unsigned char* at_;
};

inline std::string wrong_size(const void* bytes, size_t size, size_t expected) {
    return "the plan keeps " + std::to_string(bytes == nullptr ? 0 : size) +
           " bytes for this plugin; expected " + std::to_string(expected) +
           ": the plan is damaged, or of another version of this plugin";
}

// Reads numbers, each of which the caller knows to be there (`has`).
class Reader {
public:
    Reader(const void* bytes, size_t size)
        : at_(static_cast<const unsigned char*>(bytes)), left_(bytes == nullptr ? 0 : size) {}

    bool has(size_t bytes) const { return left_ >= bytes; }

    int32_t integer() { return static_cast<int32_t>(word()); }
    float real() {
        const uint32_t value = word();
        float number;
        std::memcpy(&number, &value, sizeof number);
        return number;
    }

    // Reads two words, which should be these; "" or what is wrong.
    std::string head(uint32_t magic, uint32_t format) {
        if (word() != magic) {
            std::string name;
            for (int byte = 0; byte < 4; ++byte) name += static_cast<char>(magic >> (8 * byte) & 0xFF);
            return "the plan's data for this plugin does not start with " + name + ": the plan is damaged";
        }
        if (const uint32_t got = word(); got != format) {
            return "the plan's data for this plugin has format " + std::to_string(got) +
                   ", this plugin reads format " + std::to_string(format) +
                   ": build the engine again with this plugin";
        }
        return {};
    }

private:
    uint32_t word() {
        uint32_t value = 0;
        for (int byte = 0; byte < 4; ++byte) value |= static_cast<uint32_t>(*at_++) << (8 * byte);
        left_ -= 4;
        return value;
    }

    const unsigned char* at_;
    size_t left_;
};

}  // namespace dijiang::trt
