// What a file is that somebody gave as a LoRA: adapters of other kinds are refused by their names, and what model a
// LoRA was made for is read from its keys and shapes.
#pragma once

#include "checkpoint/checkpoint.h"

#include <string>

namespace sd {

// Throws Error(unsupported), naming what the file is, where it is no LoRA.
void refuse_other_kinds(const Checkpoint & file);

// "SD1", "SD2", "SDXL", "SD3", "FLUX", what its metadata say, or "" where nothing tells.
std::string guess_base_model(const Checkpoint & file);

} // namespace sd
