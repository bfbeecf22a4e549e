#include "lora/lora_cache.h"

#include "core/error.h"

#include <algorithm>
#include <filesystem>

namespace sd {
namespace {

namespace fs = std::filesystem;

std::string stamp_of(const fs::path & path) {
    return path.u8string() +
           text("|%llu|%lld", static_cast<unsigned long long>(fs::file_size(path)),
                static_cast<long long>(fs::last_write_time(path).time_since_epoch().count()));
}

[[noreturn]] void cannot_open(const std::string & path, const fs::filesystem_error & error) {
    fail(Status::io, "%s: cannot be opened: %s", path.c_str(), error.code().message().c_str());
}

// Of a file, or of all files in a folder.
std::string stamp(const std::string & given) {
    try {
        const fs::path path = fs::u8path(given);
        if (!fs::is_directory(path)) {
            return stamp_of(path);
        }
        std::vector<std::string> parts;
        for (const fs::directory_entry & entry : fs::directory_iterator(path)) {
            if (entry.is_regular_file()) {
                parts.push_back(stamp_of(entry.path()));
            }
        }
        std::sort(parts.begin(), parts.end());
        std::string all = path.u8string();
        for (const std::string & part : parts) {
            all += "|" + part;
        }
        return all;
    } catch (const fs::filesystem_error & error) {
        cannot_open(given, error);
    }
}

} // namespace

std::string real_path(const std::string & path) {
    try {
        return fs::canonical(fs::u8path(path)).u8string();
    } catch (const fs::filesystem_error & error) {
        cannot_open(path, error);
    }
}

std::shared_ptr<const LoadedLora> LoraCache::get(const std::string & path) {
    const std::string now = stamp(path);
    std::shared_ptr<const LoadedLora> lora;
    for (const auto & kept : loaded_) {
        lora = kept->stamp == now ? kept : lora;
    }
    for (const auto & gone : let_go_) {
        const auto in_use = gone.lock();
        lora = !lora && in_use && in_use->stamp == now ? in_use : lora;
    }
    lora = lora ? lora : load(path, now);
    loaded_.remove(lora);
    loaded_.push_front(lora);
    let_go_.erase(
        std::remove_if(let_go_.begin(), let_go_.end(), [](const auto & gone) { return gone.expired(); }),
        let_go_.end());
    while (loaded_.size() > 1 && bytes() > limit_) {
        let_go_.push_back(loaded_.back());
        loaded_.pop_back();
    }
    return lora;
}

std::shared_ptr<const LoadedLora> LoraCache::load(const std::string & path, const std::string & stamp) const {
    LoraFile file = read_(path);
    auto lora = std::make_shared<LoadedLora>();
    lora->path = path;
    lora->stamp = stamp;
    lora->report = std::move(file.report);
    lora->bytes = file.bytes;
    try {
        for (LoraModule & module : file.modules) {
            const LoraTarget target = module.target;
            const int64_t columns = matrix_shape(*target.weight).columns();
            lora->updates.push_back(make_update(std::move(module), [&] {
                std::vector<float> rows(static_cast<size_t>(target.rows * columns));
                weights_.read_base(*target.weight, target.first_row * columns, target.rows * columns,
                                   rows.data());
                return rows;
            }));
        }
    } catch (const Error & error) {
        throw Error(error.status, path + ": " + error.what());
    }
    return lora;
}

size_t LoraCache::bytes() const {
    size_t sum = 0;
    for (const auto & lora : loaded_) {
        sum += lora->bytes;
    }
    return sum;
}

} // namespace sd
