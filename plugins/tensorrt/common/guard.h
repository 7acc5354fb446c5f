#pragma once

#include <exception>
#include <string>

namespace dijiang::trt {

// TensorRT's interfaces let no exception through: what a body throws (only the host being out of memory) is
// its text.
template <typename Body>
std::string text_of(Body&& body) noexcept {
    try {
        return body();
    } catch (const std::exception& error) {
        return error.what();
    }
}

}  // namespace dijiang::trt
