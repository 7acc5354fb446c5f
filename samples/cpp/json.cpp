#include "json.h"

#include <cmath>
#include <cstdlib>
#include <cstring>

#include "errors.h"

namespace dijiang {
namespace {

constexpr int kMostNested = 32;

void append_utf8(std::string& text, uint32_t code) {
    if (code < 0x80) {
        text += static_cast<char>(code);
    } else if (code < 0x800) {
        text += static_cast<char>(0xC0 | code >> 6);
        text += static_cast<char>(0x80 | (code & 0x3F));
    } else if (code < 0x10000) {
        text += static_cast<char>(0xE0 | code >> 12);
        text += static_cast<char>(0x80 | (code >> 6 & 0x3F));
        text += static_cast<char>(0x80 | (code & 0x3F));
    } else {
        text += static_cast<char>(0xF0 | code >> 18);
        text += static_cast<char>(0x80 | (code >> 12 & 0x3F));
        text += static_cast<char>(0x80 | (code >> 6 & 0x3F));
        text += static_cast<char>(0x80 | (code & 0x3F));
    }
}

bool is_digit(char c) { return c >= '0' && c <= '9'; }

}  // namespace

class JsonReader {
public:
    JsonReader(std::string_view text, const std::string& source) : text_(text), source_(source) {}

    Json document() {
        Json value = read(source_, ":", 0);
        skip_space();
        if (at_ != text_.size()) fail();
        return value;
    }

private:
    [[noreturn]] void fail() const {
        throw Failure(source_ + " is not JSON (byte " + std::to_string(at_) + ")",
                      "the file is damaged: copy or make it again");
    }

    char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

    void skip_space() {
        while (peek() != '\0' && std::strchr(" \t\r\n", peek()) != nullptr) ++at_;
    }

    bool take(char wanted) {
        skip_space();
        if (peek() != wanted) return false;
        ++at_;
        return true;
    }

    void expect(char wanted) {
        if (!take(wanted)) fail();
    }

    Json read(const std::string& where, const char* separator, int depth) {
        if (depth > kMostNested) fail();
        Json value;
        value.where_ = where;
        skip_space();
        const char c = peek();
        if (c == '{') {
            value.kind_ = Json::Kind::object;
            ++at_;
            if (take('}')) return value;
            do {
                skip_space();
                const std::string key = string();
                expect(':');
                const std::string inner = where + (separator[0] == ':' ? ": " : ".") + key;
                if (!value.object_.emplace(key, read(inner, ".", depth + 1)).second) fail();
            } while (take(','));
            expect('}');
        } else if (c == '[') {
            value.kind_ = Json::Kind::list;
            ++at_;
            if (take(']')) return value;
            do {
                value.list_.push_back(read(where + "[]", separator, depth + 1));
            } while (take(','));
            expect(']');
        } else if (c == '"') {
            value.kind_ = Json::Kind::text;
            value.text_ = string();
        } else if (c == '-' || is_digit(c)) {
            value.kind_ = Json::Kind::number;
            value.number_ = number();
        } else if (word("true") || word("false")) {
            value.kind_ = Json::Kind::boolean;
            value.boolean_ = text_[at_ - 2] == 'u';
        } else if (!word("null")) {
            fail();
        }
        return value;
    }

    bool word(std::string_view wanted) {
        if (text_.substr(at_, wanted.size()) != wanted) return false;
        at_ += wanted.size();
        return true;
    }

    void digits() {
        if (!is_digit(peek())) fail();
        while (is_digit(peek())) ++at_;
    }

    double number() {
        const size_t start = at_;
        if (peek() == '-') ++at_;
        if (peek() == '0') {
            ++at_;  // and no digit after it
        } else {
            digits();
        }
        if (peek() == '.') {
            ++at_;
            digits();
        }
        if (peek() == 'e' || peek() == 'E') {
            ++at_;
            if (peek() == '+' || peek() == '-') ++at_;
            digits();
        }
        const double value = std::strtod(std::string(text_.substr(start, at_ - start)).c_str(), nullptr);
        if (!std::isfinite(value)) fail();
        return value;
    }

    uint32_t hexadecimal() {
        uint32_t code = 0;
        for (int i = 0; i < 4; ++i, ++at_) {
            const char c = peek();
            const char* digits = "0123456789abcdef";
            const char* place = c == '\0' ? nullptr : std::strchr(digits, c >= 'A' && c <= 'F' ? c + 32 : c);
            if (place == nullptr) fail();
            code = code * 16 + static_cast<uint32_t>(place - digits);
        }
        return code;
    }

    // What follows \u, with its second half if it is a character of two.
    uint32_t escaped_code() {
        const uint32_t first = hexadecimal();
        if (first < 0xD800 || first >= 0xE000) return first;
        if (first >= 0xDC00 || !word("\\u")) fail();
        const uint32_t second = hexadecimal();
        if (second < 0xDC00 || second >= 0xE000) fail();
        return 0x10000 + ((first - 0xD800) << 10) + (second - 0xDC00);
    }

    std::string string() {
        if (peek() != '"') fail();
        ++at_;
        std::string text;
        for (;;) {
            const char c = peek();
            if (static_cast<unsigned char>(c) < 0x20) fail();  // also the end
            ++at_;
            if (c == '"') return text;
            if (c != '\\') {
                text += c;
                continue;
            }
            const char escape = peek();
            ++at_;
            if (escape == 'u') {
                append_utf8(text, escaped_code());
                continue;
            }
            const char* from = "\"\\/bfnrt";
            const char* place = escape == '\0' ? nullptr : std::strchr(from, escape);
            if (place == nullptr) fail();
            text += "\"\\/\b\f\n\r\t"[place - from];
        }
    }

    std::string_view text_;
    std::string source_;
    size_t at_ = 0;
};

Json Json::parse(std::string_view text, const std::string& source) {
    return JsonReader(text, source).document();
}

void Json::wrong(const char* expected) const {
    throw Failure(where_ + " is not " + expected,
                  "build the engine again with this version of dijiang-export");
}

const Json& Json::at(const std::string& key) const {
    if (kind_ != Kind::object) wrong("an object");
    const auto found = object_.find(key);
    if (found == object_.end()) wrong(("an object with \"" + key + "\"").c_str());
    return found->second;
}

const std::string& Json::text() const {
    if (kind_ != Kind::text) wrong("a text");
    return text_;
}

int64_t Json::integer() const {
    if (kind_ != Kind::number || number_ != std::floor(number_) || std::fabs(number_) > 9e15) {
        wrong("an integer");
    }
    return static_cast<int64_t>(number_);
}

bool Json::boolean() const {
    if (kind_ != Kind::boolean) wrong("true or false");
    return boolean_;
}

const std::vector<Json>& Json::list() const {
    if (kind_ != Kind::list) wrong("a list");
    return list_;
}

}  // namespace dijiang
