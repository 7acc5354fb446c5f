#include "options.h"

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdlib>
#include <limits>

#include "errors.h"

namespace dijiang {
namespace {

constexpr int kUsage = 2;
constexpr const char* kHelp = "`dijiang_generate --help` lists the options";

[[noreturn]] void out_of_range(const std::string& name, const std::string& value,
                               const std::string& expected) {
    throw Failure(name + " is " + value + "; expected " + expected, kHelp, kUsage);
}

uint64_t parse_seed(const std::string& name, const std::string& value) {
    char* end = nullptr;
    errno = 0;
    const unsigned long long number = std::strtoull(value.c_str(), &end, 10);
    if (value.empty() || value.find_first_not_of("0123456789") != std::string::npos || errno != 0) {
        out_of_range(name, value, "a number from 0 to 2^64 - 1");
    }
    return number;
}

int64_t parse_integer(const std::string& name, const std::string& value, int64_t least, int64_t most) {
    char* end = nullptr;
    errno = 0;
    const long long number = std::strtoll(value.c_str(), &end, 10);
    if (value.empty() || *end != '\0' || errno != 0 || number < least || number > most) {
        out_of_range(name, value, "a number from " + std::to_string(least) + " to " + std::to_string(most));
    }
    return number;
}

double parse_number(const std::string& name, const std::string& value, bool (*good)(double),
                    const char* expected) {
    char* end = nullptr;
    const double number = std::strtod(value.c_str(), &end);
    if (value.empty() || *end != '\0' || !std::isfinite(number) || !good(number)) {
        out_of_range(name, value, expected);
    }
    return number;
}

}  // namespace

const char* help_text() {
    return R"(usage: dijiang_generate --plugin LIBRARY [options] ENGINE [ID ...]

New token ids from prompt ids, with TensorRT. ENGINE is a folder that `dijiang-export build-engine` made.
Without ids, each line of standard input is a prompt, and each line of the output its continuation.

  --plugin LIBRARY  libdijiang_tensorrt_<major>.so, which `dijiang-export build-plugin --output DIR` made
  --max-tokens N    new tokens at most [128, or what a model with a last position has room for]
  --temperature X   divides the logits; 0 takes the most likely token [0]
  --top-k N         only the N most likely tokens; 0: all [0]
  --top-p X         only the fewest most likely tokens that together reach X [1]
  --min-p X         only tokens at least X times as likely as the most likely one [0]
  --seed N          of the random numbers; line n of the input draws from stream n [0]
  --stop ID,...     ends a text, besides the model's own end-of-text tokens; may be repeated
  --ignore-eos      the model's end-of-text tokens end nothing
  --tokens N        only ids below N are chosen: for vocabularies that are padded beyond the tokenizer's
  --device N        which GPU [0]
  --no-graph        enqueue every step instead of launching a captured CUDA graph
  --time            prints times to standard error
  --verbose         prints TensorRT's messages to standard error
  --help

Exit codes: 0 done, 1 failed, 2 wrong usage.
)";
}

std::vector<int64_t> parse_ids(const std::string& text) {
    std::vector<int64_t> ids;
    size_t at = 0;
    while ((at = text.find_first_not_of(" ,\t\r", at)) != std::string::npos) {
        const size_t end = std::min(text.find_first_of(" ,\t\r", at), text.size());
        const std::string id = text.substr(at, end - at);
        ids.push_back(parse_integer("a token id", id, 0, std::numeric_limits<int32_t>::max()));
        at = end;
    }
    return ids;
}

Options parse_options(int count, char** arguments) {
    Options options;
    options.decode.sampling.top_p = 1;
    options.decode.sampling.repetition_penalty = 1;
    std::vector<std::string> places;
    bool only_places = false;
    for (int i = 1; i < count; ++i) {
        std::string name = arguments[i];
        if (only_places || name.rfind("--", 0) != 0) {
            places.push_back(name);
            continue;
        }
        if (name == "--") {
            only_places = true;
            continue;
        }
        std::optional<std::string> given;
        if (const size_t equals = name.find('='); equals != std::string::npos) {
            given = name.substr(equals + 1);
            name = name.substr(0, equals);
        }
        const auto value = [&]() -> std::string {
            if (given) return *given;
            if (i + 1 >= count) throw Failure(name + " needs a value", kHelp, kUsage);
            return arguments[++i];
        };
        auto& sampling = options.decode.sampling;
        bool* flag = name == "--ignore-eos" ? &options.ignore_end
                     : name == "--time"     ? &options.time
                     : name == "--verbose"  ? &options.verbose
                     : name == "--help"     ? &options.help
                                            : nullptr;
        if (name == "--no-graph") {
            options.decode.cuda_graph = false;
        } else if (flag != nullptr) {
            *flag = true;
        } else if (name == "--plugin") {
            options.plugin = value();
        } else if (name == "--max-tokens") {
            options.max_tokens = parse_integer(name, value(), 1, 1 << 30);
        } else if (name == "--temperature") {
            sampling.temperature = parse_number(name, value(), [](double x) { return x >= 0; }, "0 or more");
        } else if (name == "--top-k") {
            sampling.top_k = static_cast<int32_t>(parse_integer(name, value(), 0, 1 << 30));
        } else if (name == "--top-p") {
            sampling.top_p =
                parse_number(name, value(), [](double x) { return x > 0 && x <= 1; }, "above 0, at most 1");
        } else if (name == "--min-p") {
            sampling.min_p = parse_number(name, value(), [](double x) { return x >= 0 && x <= 1; }, "0 to 1");
        } else if (name == "--seed") {
            sampling.seed = parse_seed(name, value());
        } else if (name == "--stop") {
            for (const int64_t id : parse_ids(value())) {
                options.decode.stop_ids.push_back(static_cast<int32_t>(id));
            }
        } else if (name == "--tokens") {
            options.decode.tokens_to_allow = parse_integer(name, value(), 1, 1 << 30);
        } else if (name == "--device") {
            options.device = static_cast<int>(parse_integer(name, value(), 0, 1023));
        } else {
            throw Failure("there is no option " + name, kHelp, kUsage);
        }
        const bool takes_none = flag != nullptr || name == "--no-graph";
        if (given && takes_none) throw Failure(name + " takes no value", kHelp, kUsage);
    }
    if (options.help) return options;
    if (places.empty()) throw Failure("no engine folder was named", kHelp, kUsage);
    if (options.plugin.empty()) {
        throw Failure(
            "no plugin was named",
            "--plugin DIR/libdijiang_tensorrt_<major>.so, made by `dijiang-export build-plugin --output DIR`",
            kUsage);
    }
    options.engine = places.front();
    if (places.size() > 1) {
        std::string text;
        for (size_t i = 1; i < places.size(); ++i) text += places[i] + " ";
        options.prompt = parse_ids(text);
    }
    return options;
}

}  // namespace dijiang
