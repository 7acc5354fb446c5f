// What a user sees when something goes wrong: one sentence, and what to do about it.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

namespace dijiang {

struct Failure : std::runtime_error {
    Failure(const std::string& what, std::string what_to_do = "", int code = 1)
        : std::runtime_error(what), hint(std::move(what_to_do)), exit_code(code) {}

    std::string hint;
    int exit_code;  // 1 failed, 2 wrong usage
};

}  // namespace dijiang
