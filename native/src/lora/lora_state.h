// Which LoRAs act, how strongly and when: what a prompt asks for, and what is in force. Both are brought to
// one canonical form, so that neither the order of names nor the history matters.
#pragma once

#include "lora/lora_formats.h"
#include "lora/lora_names.h"

#include <array>
#include <string>
#include <vector>

namespace sd {

// The multiplier of some modules, on top of the LoRA's own: those at or below a path in either spelling of
// the weights ("model.diffusion_model.input_blocks.4", "unet.down_blocks.1.attentions.0"). The nearest path
// wins.
struct LoraBlock {
    std::string prefix;
    double factor = 1;
};

// One LoRA as a prompt names it.
struct LoraUse {
    std::string path;
    std::array<double, text_encoders> text{1, 1, 1}; // multipliers of the text encoders, see TextEncoder,
    double unet = 1;                                 // and of the denoiser
    double start = 0, stop = 1; // of the steps; the text encoder runs before them and ignores these
    std::vector<LoraBlock> blocks;

    bool acts() const { return unet != 0 || text != decltype(text){}; }
};

// For each image of a batch, or one list for all of them.
struct LoraState {
    std::vector<std::vector<LoraUse>> images;
};

// How much more or less of one LoRA is asked for than is in force; `stop`, `start` and `blocks` tell which
// use.
struct LoraChange {
    size_t image = 0;
    LoraUse use; // text and unet: the differences
};

// Sorted by path, times and blocks; uses of the same three are summed; what is zero, or acts in no step, is
// left out; images that all ask for the same are one. Throws Error(bad_argument) for multipliers that are no
// finite numbers, and for steps that are no range.
LoraState canonical(const LoraState & state);

// wanted − current for what is asked for, −current for what is no longer named. Both are canonical; empty
// where nothing changes.
std::vector<LoraChange> lora_state_diff(const LoraState & current, const LoraState & wanted);

bool operator==(const LoraUse & a, const LoraUse & b);
bool operator==(const LoraState & a, const LoraState & b);

// What a use makes of one weight's update, whatever the step.
double multiplier_of(const LoraUse & use, const Weight & weight);

// Whether step `step` of `steps`, counted from 0, lies in the use's range.
bool acts_at(const LoraUse & use, int step, int steps);

} // namespace sd
