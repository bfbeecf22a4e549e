// What the tokenizers need of Unicode 16.0: classes, normal form C, lower case, clusters.
#pragma once

#include <string>
#include <string_view>

namespace sd::unicode {

// Bytes that are no UTF-8 become U+FFFD, as many as Python's errors="replace" makes of them.
std::u32string decode(std::string_view utf8);

bool is_space(char32_t character);  // \s, White_Space
bool is_letter(char32_t character); // \p{L}
bool is_number(char32_t character); // \p{N}

// Parts of the rules by which characters are shown as one (grapheme clusters, Unicode's annex 29): marks join what
// they follow, some signs what follows them, and control characters, of those that T5's normalisation changes, neither.
bool joins_previous(char32_t character);
bool joins_next(char32_t character);
bool stands_alone(char32_t character);

std::u32string normal_form_c(std::u32string text);

// Each character by itself, whatever stands around it.
std::u32string lower(std::u32string_view text);

} // namespace sd::unicode
