#include "checkpoint/shards.h"

#include "core/error.h"

#include <cstdlib>
#include <filesystem>
#include <regex>

namespace sd {

std::vector<std::string> shard_files(const std::string & path) {
    static const std::regex NAME("(.*-)([0-9]{5})-of-([0-9]{5})(\\.[a-z]+)");
    const std::filesystem::path whole = std::filesystem::u8path(path);
    const std::string           file = whole.filename().u8string();
    std::smatch                 found;
    if (!std::regex_match(file, found, NAME)) {
        return {path};
    }
    const int                n = std::atoi(found[3].str().c_str());
    std::vector<std::string> out;
    for (int k = 1; k <= n; ++k) {
        const std::string name = text("%s%05d-of-%05d%s", found[1].str().c_str(), k, n, found[4].str().c_str());
        out.push_back((whole.parent_path() / std::filesystem::u8path(name)).u8string());
        std::error_code ignored;
        if (!std::filesystem::is_regular_file(std::filesystem::u8path(out.back()), ignored)) {
            fail(Status::bad_file, "%s: is one of %d files, but %s is missing; the download is not complete",
                 path.c_str(), n, name.c_str());
        }
    }
    return out.empty() ? std::vector<std::string>{path} : out;
}

} // namespace sd
