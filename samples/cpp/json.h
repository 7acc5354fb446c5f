// A JSON reader for engine.json: strict, bounded in depth, no writer. Names may not repeat, and escapes must
// make whole characters. Bytes from 0x80 on are taken as they are.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace dijiang {

class Json {
public:
    // Throws Failure, which names `source` and the byte.
    static Json parse(std::string_view text, const std::string& source);

    // Each throws Failure if the value is of another kind; `where` of the root is the source's name.
    const Json& at(const std::string& key) const;  // must be there
    const std::string& text() const;
    int64_t integer() const;
    bool boolean() const;
    const std::vector<Json>& list() const;

private:
    friend class JsonReader;
    enum class Kind { null, boolean, number, text, list, object };
    [[noreturn]] void wrong(const char* expected) const;

    Kind kind_ = Kind::null;
    bool boolean_ = false;
    double number_ = 0;
    std::string text_;
    std::vector<Json> list_;
    std::map<std::string, Json> object_;
    std::string where_;  // such as "engine.json: spec.eos_token_ids"
};

}  // namespace dijiang
