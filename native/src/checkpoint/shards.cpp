#include "checkpoint/shards.h"

#include "core/error.h"

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <system_error>

namespace sd {
namespace {

constexpr size_t DIGITS = 5;
constexpr char   OF[] = "-of-";
constexpr size_t NUMBERS = 2 * DIGITS + sizeof OF - 1; // "00001-of-00003"

bool is_number(const std::string & text) {
    return std::all_of(text.begin(), text.end(), [](char c) { return c >= '0' && c <= '9'; });
}

} // namespace

std::vector<std::string> shard_files(const std::string & path) {
    const size_t dot = path.rfind('.');
    if (dot == std::string::npos || dot < NUMBERS + 1 || path[dot - NUMBERS - 1] != '-') {
        return {path};
    }
    const std::string begin = path.substr(0, dot - NUMBERS), ending = path.substr(dot);
    const std::string k = path.substr(dot - NUMBERS, DIGITS), n = path.substr(dot - DIGITS, DIGITS);
    const int         files = std::atoi(n.c_str());
    if (!is_number(k) || !is_number(n) || files < 1 || path.compare(dot - NUMBERS + DIGITS, sizeof OF - 1, OF) != 0) {
        return {path};
    }
    std::vector<std::string> out;
    for (int i = 1; i <= files; ++i) {
        out.push_back(begin + text("%05d%s%05d", i, OF, files) + ending);
        std::error_code ignored;
        if (!std::filesystem::is_regular_file(std::filesystem::u8path(out.back()), ignored)) {
            fail(Status::bad_file, "%s: is one of %d files, but %s is missing; the download is not complete",
                 path.c_str(), files, std::filesystem::u8path(out.back()).filename().u8string().c_str());
        }
    }
    return out;
}

} // namespace sd
