#pragma once

#include "crossing.h"

namespace binding {

// LoRAs in the form that C wants. Each comes as a dict: path, te, unet, start, stop, blocks.
class Loras {
  public:
    explicit Loras(const std::vector<py::dict> & all);

    const sd_lora * data() const { return loras_.data(); }
    int size() const { return static_cast<int>(loras_.size()); }

  private:
    std::vector<std::string> paths_;
    std::vector<std::vector<std::pair<std::string, double>>> prefixes_;
    std::vector<std::vector<sd_lora_block>> blocks_;
    std::vector<sd_lora> loras_;
};

} // namespace binding
