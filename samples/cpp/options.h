// The command line.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "decoder.h"

namespace dijiang {

struct Options {
    std::string engine, plugin;
    std::optional<std::vector<int64_t>> prompt;  // none: prompts come from standard input, one a line
    std::optional<int64_t> max_tokens;
    DecodeOptions decode;
    int device = 0;
    bool ignore_end = false, time = false, verbose = false, help = false;
};

// Throws Failure with exit code 2.
Options parse_options(int count, char** arguments);

// Ids with spaces or commas between them. Throws Failure.
std::vector<int64_t> parse_ids(const std::string& text);

const char* help_text();

}  // namespace dijiang
