// LoRA files that were read: kept by path, size and time of their last change, the least recently used out
// first.
#pragma once

#include "lora/lora_file.h"
#include "lora/lora_formats.h"

#include <functional>
#include <list>
#include <memory>
#include <string>
#include <vector>

namespace sd {

// How a file becomes modules: read_lora with the names of the model at hand.
using LoraReader = std::function<LoraFile(const std::string & path)>;

struct LoadedLora {
    std::string path;  // the real one
    std::string stamp; // real path, size and time: another where the file is another
    LoraReport report;
    std::vector<Update> updates;
    size_t bytes = 0;
};

// The path without links and detours. Throws Error(io) where there is nothing.
std::string real_path(const std::string & path);

class LoraCache {
  public:
    LoraCache(LoraReader read, const WeightStore & weights, size_t limit)
        : read_(std::move(read)), weights_(weights), limit_(limit) {}

    // Reads the file, unless it is the one that is here. Throws as the reader does. The path is a real one.
    std::shared_ptr<const LoadedLora> get(const std::string & path);

    size_t bytes() const;
    void clear() { loaded_.clear(); }

  private:
    std::shared_ptr<const LoadedLora> load(const std::string & path, const std::string & stamp) const;

    LoraReader read_;
    const WeightStore & weights_;
    size_t limit_;                                        // bytes
    std::list<std::shared_ptr<const LoadedLora>> loaded_; // the newest first
    std::vector<std::weak_ptr<const LoadedLora>> let_go_; // beyond the limit, but perhaps still in use
};

} // namespace sd
