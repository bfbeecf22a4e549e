#include "core/error.h"

#include <cstdarg>
#include <cstdio>

namespace sd {
namespace {

std::string format_text(const char * format, va_list arguments) {
    va_list again;
    va_copy(again, arguments);
    const int length = std::vsnprintf(nullptr, 0, format, again);
    va_end(again);
    if (length < 0) {
        return format;
    }
    std::string out(static_cast<size_t>(length) + 1, '\0');
    std::vsnprintf(out.data(), out.size(), format, arguments);
    out.pop_back();
    return out;
}

} // namespace

void fail(Status status, const char * format, ...) {
    va_list arguments;
    va_start(arguments, format);
    const std::string message = format_text(format, arguments);
    va_end(arguments);
    throw Error(status, message);
}

std::string text(const char * format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::string out = format_text(format, arguments);
    va_end(arguments);
    return out;
}

} // namespace sd
