// UTF-8 as RFC 3629 defines it: no overlong forms, no surrogates, nothing above U+10FFFF.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace sd {

// The length in bytes of the character that `text` begins with, 0 where it begins with no valid one.
size_t utf8_length(std::string_view text);

bool is_utf8(std::string_view text);

// `code` is a valid code point.
void append_utf8(std::string & out, uint32_t code);

} // namespace sd
