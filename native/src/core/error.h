// Errors inside the engine are thrown; only c_api turns them into a status and a sentence.
#pragma once

#include <stdexcept>
#include <string>

namespace sd {

// The same numbers as sd_status in sdcpp.h.
enum class Status {
    ok = 0,
    bad_argument,  // the caller can mend it
    bad_file,      // damaged, or not what it claims to be
    unsupported,   // sound, but nothing that we know
    out_of_memory,
    cancelled,     // a callback said so
    busy,          // another thread is using the context
    io,            // the operating system refused
    internal,      // ours
};

class Error : public std::runtime_error {
  public:
    Error(Status status, const std::string & message) : std::runtime_error(message), status(status) {}

    const Status status;
};

// A sentence: which file or argument, what is wrong with the numbers, the next step. printf's format.
[[noreturn, gnu::format(printf, 2, 3)]] void fail(Status status, const char * format, ...);

// printf into a string.
[[gnu::format(printf, 1, 2)]] std::string text(const char * format, ...);

} // namespace sd
