// Reading protocol buffers (protobuf.dev/programming-guides/encoding): a message is a run of fields, each a key, which
// is the field's number times eight plus its wire type, and a value.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace sd {

struct ProtoField {
    uint32_t         number;
    uint64_t         value; // of numbers; of a float its bits
    std::string_view bytes; // of strings, bytes and messages inside
};

class ProtoReader {
  public:
    // `where` names the file in messages.
    ProtoReader(std::string_view message, const std::string & where) : left_(message), where_(where) {}

    // The next field; nothing at the end. Throws Error(bad_file).
    std::optional<ProtoField> next();

  private:
    [[noreturn]] void wrong(const char * what) const;
    uint64_t          varint();
    std::string_view  take(uint64_t n);

    std::string_view    left_;
    const std::string & where_;
};

} // namespace sd
