#include "core/words.h"

#include "core/utf8.h"

#include <cmath>
#include <locale>
#include <sstream>

namespace sd {
namespace {

template <typename Number> std::string shortest(Number number, std::initializer_list<int> precisions) {
    if (!std::isfinite(number)) {
        return std::isnan(number) ? "nan" : number < 0 ? "-inf" : "inf";
    }
    std::string out;
    for (const int digits : precisions) {
        std::stringstream stream;
        stream.imbue(std::locale::classic());
        stream.precision(digits);
        stream << number;
        out = stream.str();
        Number again = 0;
        if (stream >> again && again == number) {
            break;
        }
    }
    return out;
}

} // namespace

std::string grouped(uint64_t number) {
    std::string digits = std::to_string(number);
    for (size_t i = digits.size(); i > 3; i -= 3) {
        digits.insert(i - 3, ",");
    }
    return digits;
}

std::string number_text(double number) { return shortest(number, {6, 15, 16, 17}); }
std::string number_text(float number) { return shortest(number, {6, 7, 8, 9}); }

std::string printable(std::string_view name) {
    constexpr size_t LONGEST = 200;
    std::string      out;
    while (!name.empty()) {
        if (out.size() >= LONGEST) {
            return out + "...";
        }
        const size_t           length = utf8_length(name);
        const std::string_view character = name.substr(0, length);
        const bool             is_control = (length == 1 && (name[0] < ' ' || name[0] == 0x7f)) ||
                                (length == 2 && character >= "\xc2\x80" && character < "\xc2\xa0");
        if (length == 0 || is_control) {
            out += '?';
        } else {
            out += character;
        }
        name.remove_prefix(length == 0 ? 1 : length);
    }
    return out;
}

} // namespace sd
