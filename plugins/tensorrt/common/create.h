// Makes a plugin of what a node or a plan says of it, as creators of either TensorRT do.
#pragma once

#include <exception>
#include <string>

#include "common/log.h"

namespace dijiang::trt {

// read(attributes) returns "" or what is wrong. Null, and a message, if no plugin can be made of them.
template <typename Layer, typename Plugin, typename Read>
Plugin* create(const char* name, Read read) noexcept {
    try {
        typename Layer::Attributes attributes;
        std::string wrong = read(attributes);
        if (wrong.empty()) wrong = why_unsupported(attributes);
        if (wrong.empty()) return new Plugin(Layer(attributes));
        fail("node " + std::string(name == nullptr ? "" : name) + ": " + wrong, nullptr, Layer::kName);
    } catch (const std::exception& error) {
        fail(std::string("cannot create: ") + error.what(), nullptr, Layer::kName);
    }
    return nullptr;
}

}  // namespace dijiang::trt
