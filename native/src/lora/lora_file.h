// Reads a LoRA file of any trainer: which module of the model each key means, by which convention, at which scale.
#pragma once

#include "checkpoint/checkpoint.h"
#include "lora/lora_module.h"
#include "lora/lora_names.h"
#include "nn/weights.h"

#include <map>
#include <string>
#include <vector>

namespace sd {

// What became of every key of a file.
struct LoraReport {
    std::string                        path;
    std::map<std::string, int>         formats, kinds; // modules by convention ("kohya", "peft", ...) and by kind
    std::map<int64_t, int>             ranks;          // modules by rank
    std::vector<std::string>           applied;        // stems
    std::vector<std::string>           padded;         // "stem: 64 of 384 input features"
    std::vector<std::string>           skipped;        // "stem: why", with both shapes
    std::vector<std::string>           unmatched;      // keys that mean nothing in this model
    std::vector<std::string>           absent;         // keys of components that this model lacks
    std::vector<std::string>           warnings;
    std::string                        base_model;     // what the file was made for, as far as it tells
    std::string                        settings;       // that it needs, as a sentence; "" where the usual ones do
    double                             scale_min = 0, scale_max = 0;
    int                                text_modules = 0, unet_modules = 0;
    std::map<std::string, std::string> metadata;
};

// One JSON object with a member for every field.
std::string report_json(const LoraReport & report);

struct LoraFile {
    std::vector<LoraModule> modules; // ordered by stem, whatever the order in the file
    LoraReport              report;
    size_t                  bytes = 0; // of all factors, for the cache
};

// `path` is a safetensors or GGUF file, or a folder that PEFT or diffusers saved a LoRA to. `model` says what
// the model is in messages ("SD1"). Throws Error(bad_file) where the file is damaged, holds a NaN, or nothing of
// it fits; Error(unsupported) where it is no LoRA, naming what it is.
LoraFile read_lora(const std::string & path, const LoraNames & names, const std::string & model);

} // namespace sd
