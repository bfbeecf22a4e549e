// An opened LoRA file: its tensors by the module that they are for, before any of them is read.
#pragma once

#include "checkpoint/checkpoint.h"
#include "lora/lora_build.h"
#include "lora/lora_config.h"

#include <map>
#include <string>

namespace sd {

struct LoraSource {
    // `path` as for read_lora. What no suffix explains, what the file says of itself, and what it brings along
    // beside updates goes into the report. `in_ram` reads the file whole, so that one that is cut meanwhile is an
    // Error(io), where a mapped one would end the process. Throws Error(unsupported) where it is no LoRA.
    LoraSource(const std::string & path, LoraReport & report, bool in_ram);

    Checkpoint                       file;
    LoraConfig                       config;
    std::map<std::string, LoraGroup> groups; // by stem
    bool                             flags_ia3 = false; // the file says for IA3 which side it is on
};

// The convention by which a stem and its suffixes are spelled.
std::string format_of(const LoraGroup & group);

} // namespace sd
