#include "families/components.h"

#include "core/error.h"

#include <algorithm>

namespace sd {

void check_components(const Checkpoint & file, const char * family, std::initializer_list<NeededComponent> needed) {
    std::string missing;
    for (const NeededComponent & component : needed) {
        const bool there = std::any_of(component.any_of.begin(), component.any_of.end(),
                                       [&](const char * name) { return file.has(name); });
        if (!there) {
            missing += (missing.empty() ? "" : ", ") + std::string(component.argument) + "=";
        }
    }
    if (!missing.empty()) {
        fail(Status::bad_file, "%s: is a denoiser of %s without all that belongs to it; give the rest as %s",
             file.path().c_str(), family, missing.c_str());
    }
}

NeededComponent needed_vae() {
    return {"vae", {"first_stage_model.decoder.conv_in.weight", "vae.decoder.conv_in.weight"}};
}

} // namespace sd
