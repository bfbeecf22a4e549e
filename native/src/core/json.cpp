#include "core/json.h"

#include "core/error.h"
#include "core/utf8.h"
#include "core/words.h"

#include <algorithm>
#include <locale>
#include <sstream>

namespace sd {

class JsonParser {
  public:
    JsonParser(std::string_view text, const std::string & where, const Json::Limits & limits)
        : text_(text), where_(where), limits_(limits) {}

    Json document() {
        if (text_.size() > limits_.bytes) {
            fail(Status::bad_file, "%s: has %s bytes of JSON; at most %s are read", where_.c_str(),
                 grouped(text_.size()).c_str(), grouped(limits_.bytes).c_str());
        }
        Json out = value(0);
        skip_space();
        if (at_ < text_.size()) {
            wrong("text goes on after the end of the value");
        }
        return out;
    }

  private:
    [[noreturn]] void wrong(const char * what) const {
        fail(Status::bad_file, "%s: is no valid JSON: %s at byte %s; the file is damaged", where_.c_str(),
             what, grouped(at_).c_str());
    }

    // 0 past the end; a 0 inside the text is never valid either.
    char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

    bool take(char wanted) {
        if (peek() != wanted) {
            return false;
        }
        ++at_;
        return true;
    }

    void skip_space() {
        while (peek() == ' ' || peek() == '\n' || peek() == '\t' || peek() == '\r') {
            ++at_;
        }
    }

    Json value(int depth) {
        skip_space();
        if (depth > limits_.depth) {
            wrong("too deep a nesting");
        }
        if (++values_ > limits_.values) {
            wrong("too many values");
        }
        Json out;
        switch (peek()) {
        case '{': out.value_ = object(depth); break;
        case '[': out.value_ = array(depth); break;
        case '"': out.value_ = string(); break;
        case 't':
            word("true");
            out.value_ = true;
            break;
        case 'f':
            word("false");
            out.value_ = false;
            break;
        case 'n': word("null"); break;
        default: out.value_ = number(); break;
        }
        return out;
    }

    void word(std::string_view wanted) {
        if (text_.substr(at_, wanted.size()) != wanted) {
            wrong("an unknown word");
        }
        at_ += wanted.size();
    }

    std::vector<JsonMember> object(int depth) {
        const size_t            begin = at_++;
        std::vector<JsonMember> members;
        skip_space();
        if (take('}')) {
            return members;
        }
        do {
            skip_space();
            if (peek() != '"') {
                wrong("no name where one is due");
            }
            std::string name = string();
            skip_space();
            if (!take(':')) {
                wrong("no ':' after a name");
            }
            members.push_back({std::move(name), value(depth + 1), members.size()});
            skip_space();
        } while (take(','));
        if (!take('}')) {
            wrong("an object without end");
        }
        const auto by_name = [](const JsonMember & a, const JsonMember & b) { return a.name < b.name; };
        const auto same = [](const JsonMember & a, const JsonMember & b) { return a.name == b.name; };
        std::sort(members.begin(), members.end(), by_name);
        const auto twice = std::adjacent_find(members.begin(), members.end(), same);
        if (twice != members.end()) {
            at_ = begin;
            wrong(("the name '" + printable(twice->name) + "' twice in the object").c_str());
        }
        return members;
    }

    std::vector<Json> array(int depth) {
        ++at_;
        std::vector<Json> values;
        skip_space();
        if (take(']')) {
            return values;
        }
        do {
            values.push_back(value(depth + 1));
            skip_space();
        } while (take(','));
        if (!take(']')) {
            wrong("an array without end");
        }
        return values;
    }

    std::string string() {
        ++at_;
        std::string out;
        while (!take('"')) {
            if (at_ == text_.size()) {
                wrong("a string without end");
            }
            if (take('\\')) {
                escape(out);
                continue;
            }
            const size_t length = utf8_length(text_.substr(at_, 4));
            if (length == 0) {
                wrong("invalid UTF-8");
            }
            if (static_cast<uint8_t>(peek()) < 0x20) {
                wrong("a control character in a string");
            }
            out += text_.substr(at_, length);
            at_ += length;
        }
        return out;
    }

    void escape(std::string & out) {
        constexpr std::string_view LETTERS = "\"\\/bfnrt";
        constexpr std::string_view MEANINGS = "\"\\/\b\f\n\r\t";
        if (take('u')) {
            append_utf8(out, escaped_code());
            return;
        }
        const size_t found = peek() ? LETTERS.find(peek()) : LETTERS.npos;
        if (found == LETTERS.npos) {
            wrong("an unknown escape");
        }
        ++at_;
        out += MEANINGS[found];
    }

    // What is beyond U+FFFF is written as a high and a low surrogate; one alone means nothing.
    uint32_t escaped_code() {
        const uint32_t high = four_digits();
        if (high < 0xd800 || high > 0xdfff) {
            return high;
        }
        if (high < 0xdc00 && take('\\') && take('u')) {
            const uint32_t low = four_digits();
            if (low >= 0xdc00 && low <= 0xdfff) {
                return 0x10000 + ((high - 0xd800) << 10) + (low - 0xdc00);
            }
        }
        wrong("half a surrogate pair");
    }

    uint32_t four_digits() {
        uint32_t out = 0;
        for (int i = 0; i < 4; ++i, ++at_) {
            const char c = peek();
            if (c >= '0' && c <= '9') {
                out = out * 16 + static_cast<uint32_t>(c - '0');
            } else if ((c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F')) {
                out = out * 16 + static_cast<uint32_t>((c | 0x20) - 'a' + 10);
            } else {
                wrong("no four hexadecimal digits");
            }
        }
        return out;
    }

    size_t digits() {
        const size_t begin = at_;
        while (peek() >= '0' && peek() <= '9') {
            ++at_;
        }
        return at_ - begin;
    }

    Json::Number number() {
        const size_t begin = at_;
        const bool   negative = take('-');
        const bool   leading_zero = peek() == '0';
        const size_t whole = digits();
        if (whole == 0) {
            wrong(at_ == text_.size() ? "the end of the text where a value is due"
                                      : "no value where one is due");
        }
        if (leading_zero && whole > 1) {
            wrong("a number with a leading zero");
        }
        const std::string_view integer = text_.substr(at_ - whole, whole);
        bool                   is_whole = true;
        if (take('.')) {
            is_whole = false;
            if (digits() == 0) {
                wrong("no digit after the point");
            }
        }
        if (take('e') || take('E')) {
            is_whole = false;
            if (!take('+')) {
                take('-');
            }
            if (digits() == 0) {
                wrong("no digit in the exponent");
            }
        }
        const std::optional<int64_t> exact = is_whole ? exact_integer(integer, negative) : std::nullopt;
        if (exact) {
            return {negative && *exact == 0 ? -0.0 : static_cast<double>(*exact), exact};
        }
        return {rounded(text_.substr(begin, at_ - begin)), std::nullopt};
    }

    // Nothing where 64 bits do not hold it.
    static std::optional<int64_t> exact_integer(std::string_view digits, bool negative) {
        uint64_t       out = 0;
        const uint64_t largest = static_cast<uint64_t>(INT64_MAX) + (negative ? 1 : 0);
        for (const char c : digits) {
            const uint64_t digit = static_cast<uint64_t>(c - '0');
            if (out > (largest - digit) / 10) {
                return std::nullopt;
            }
            out = out * 10 + digit;
        }
        return static_cast<int64_t>(negative ? 0 - out : out);
    }

    // By a stream, because strtod follows the process's locale and from_chars lacks floats on older macOS.
    double rounded(std::string_view digits) const {
        std::istringstream stream{std::string(digits)};
        stream.imbue(std::locale::classic());
        double out = 0;
        if (!(stream >> out)) {
            wrong("too large a number");
        }
        return out;
    }

    const std::string_view text_;
    const std::string &    where_;
    const Json::Limits     limits_;
    size_t                 at_ = 0;
    size_t                 values_ = 0;
};

Json Json::parse(std::string_view text, const std::string & where, const Limits & limits) {
    return JsonParser(text, where, limits).document();
}

Json Json::parse(std::string_view text, const std::string & where) { return parse(text, where, Limits()); }

std::optional<bool> Json::boolean() const {
    const bool * value = std::get_if<bool>(&value_);
    return value ? std::optional<bool>(*value) : std::nullopt;
}

std::optional<double> Json::number() const {
    const Number * value = std::get_if<Number>(&value_);
    return value ? std::optional<double>(value->value) : std::nullopt;
}

std::optional<int64_t> Json::integer() const {
    const Number * value = std::get_if<Number>(&value_);
    return value ? value->exact : std::nullopt;
}

const Json * Json::find(std::string_view name) const {
    const std::vector<JsonMember> * members = object();
    if (!members) {
        return nullptr;
    }
    const auto before = [](const JsonMember & member, std::string_view wanted) {
        return member.name < wanted;
    };
    const auto found = std::lower_bound(members->begin(), members->end(), name, before);
    return found != members->end() && found->name == name ? &found->value : nullptr;
}

std::optional<std::string> Json::scalar_text() const {
    if (const std::string * text = string()) {
        return *text;
    }
    if (const auto truth = boolean()) {
        return *truth ? "true" : "false";
    }
    if (const auto whole = integer()) {
        return std::to_string(*whole);
    }
    if (const auto value = number()) {
        return number_text(*value);
    }
    return std::nullopt;
}

} // namespace sd
