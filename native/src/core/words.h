// Numbers and foreign text, as messages and metadata show them.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace sd {

// 1234567 -> "1,234,567"
std::string grouped(uint64_t number);

// As few digits as read back as the same number, whatever the locale.
std::string number_text(double number);
std::string number_text(float number);

// A name out of a file, safe to print: control characters and invalid UTF-8 become '?', long names are cut.
std::string printable(std::string_view name);

} // namespace sd
