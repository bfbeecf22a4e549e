// Models that were distilled to paint in a few steps. Nothing in their weights tells; their names do.
#pragma once

#include "families/family.h"

#include <optional>
#include <string>

namespace sd {

// What a request takes where it says nothing: `usual`, or what a distilled model needs, by the name of its file or
// folder: "sdxl_lightning_4step.safetensors", "sdxl-turbo".
Defaults defaults_for(const std::string & path, const Defaults & usual);

// What a LoRA of this name needs, where it was distilled to paint in a few steps on this kind of model.
struct DistilledLora {
    int         steps;
    float       cfg_scale;
    double      multiplier;
    std::string sentence; // "Hyper, made for steps 8, …"
};
std::optional<DistilledLora> settings_of_lora(const std::string & path, const Pipeline & model);

// The same for rectified flows, which keep sampler, scheduler and their own guidance: "sd3.5_large_turbo",
// "flux1-dev-hyper-8steps". `steps` where the name says none.
Defaults distilled_flow(const std::string & path, const Defaults & usual, int steps);

// Whether this is FLUX.1 Kontext, which has the structure of dev.
bool is_kontext(const std::string & path);

// Whether this is Stability's own SDXL Turbo, which was trained at 512 pixels.
bool is_sdxl_turbo(const std::string & path);

} // namespace sd
