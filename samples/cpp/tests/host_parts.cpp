// The parts that need neither CUDA nor TensorRT, one line of standard input at a time.
//
//   host_parts sha256    a line is bytes as hexadecimal digits; prints their SHA-256
//   host_parts json      a line is a document as hexadecimal digits, an object with "value"; prints what that
//                        is: text HEX, integer N, true, false, a list's parts in brackets, or other
#include <cstdio>
#include <iostream>
#include <string>

#include "../errors.h"
#include "../json.h"
#include "../sha256.h"

namespace {

std::string from_hex(const std::string& digits) {
    std::string bytes;
    for (size_t i = 0; i + 1 < digits.size(); i += 2) {
        bytes += static_cast<char>(std::stoi(digits.substr(i, 2), nullptr, 16));
    }
    return bytes;
}

std::string to_hex(const std::string& bytes) {
    std::string digits;
    for (const char byte : bytes) {
        char text[3];
        std::snprintf(text, sizeof text, "%02x", static_cast<unsigned char>(byte));
        digits += text;
    }
    return digits;
}

// What a value is can only be learned by asking for it, as the program does.
template <typename Describe>
bool tried(std::string& result, Describe&& describe) {
    try {
        result = describe();
        return true;
    } catch (const dijiang::Failure&) {
        return false;
    }
}

std::string describe(const dijiang::Json& value) {
    std::string result = "other";
    if (tried(result, [&] { return "text " + to_hex(value.text()); }) ||
        tried(result, [&] { return "integer " + std::to_string(value.integer()); }) ||
        tried(result, [&] { return value.boolean() ? "true" : "false"; })) {
        return result;
    }
    tried(result, [&] {
        std::string parts;
        for (const dijiang::Json& part : value.list()) parts += describe(part) + ",";
        return "[" + parts + "]";
    });
    return result;
}

}  // namespace

int main(int count, char** arguments) {
    const std::string mode = count == 2 ? arguments[1] : "";
    if (mode != "sha256" && mode != "json") return 2;
    std::string line;
    while (std::getline(std::cin, line)) {
        const std::string bytes = from_hex(line);
        if (mode == "sha256") {
            std::puts(dijiang::sha256_hex(bytes.data(), bytes.size()).c_str());
            continue;
        }
        try {
            std::puts(describe(dijiang::Json::parse(bytes, "here").at("value")).c_str());
        } catch (const dijiang::Failure& failure) {
            std::printf("error %s\n", failure.what());
        }
    }
    return 0;
}
