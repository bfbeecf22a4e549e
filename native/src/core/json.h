// JSON (RFC 8259) as a tree: for headers of safetensors files and for the configs of diffusers folders.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace sd {

struct JsonMember;

class Json {
  public:
    // What a text may cost us; beyond it is an error, like any other.
    struct Limits {
        size_t bytes = 100u << 20;
        size_t values = 2u << 20;
        int    depth = 64;
    };

    // `where` names the text in messages. Names that stand twice in one object are refused.
    static Json parse(std::string_view text, const std::string & where, const Limits & limits);
    static Json parse(std::string_view text, const std::string & where);

    // Each gives nothing where the value is of another kind.
    bool                            is_null() const { return std::holds_alternative<std::monostate>(value_); }
    std::optional<bool>             boolean() const;
    std::optional<double>           number() const;
    std::optional<int64_t>          integer() const; // exact; written without fraction and exponent
    const std::string *             string() const { return std::get_if<std::string>(&value_); }
    const std::vector<Json> *       array() const { return std::get_if<std::vector<Json>>(&value_); }
    const std::vector<JsonMember> * object() const { return std::get_if<std::vector<JsonMember>>(&value_); }

    // The value of that name; null where there is none, or where this is no object.
    const Json * find(std::string_view name) const;

    // A string as it is, a number or boolean in writing; nothing for null, arrays and objects.
    std::optional<std::string> scalar_text() const;

  private:
    friend class JsonParser;

    struct Number {
        double                 value;
        std::optional<int64_t> exact;
    };

    std::variant<std::monostate, bool, Number, std::string, std::vector<Json>, std::vector<JsonMember>>
        value_;
};

// Objects keep their members ordered by name; `place` is that in the text.
struct JsonMember {
    std::string name;
    Json        value;
    size_t      place = 0;
};

} // namespace sd
