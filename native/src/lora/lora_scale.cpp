// What needs no factors: full differences, replacements, and IA3, which scales rows or inputs.
#include "lora/lora_formats.h"

#include <memory>

namespace sd {
namespace {

std::shared_ptr<const std::vector<float>> take_scaled(LoraModule & module, size_t elements) {
    std::vector<float> values = take_factor(module, "diff", elements);
    for (float & value : values) {
        value *= static_cast<float>(module.scale);
    }
    return std::make_shared<const std::vector<float>>(std::move(values));
}

} // namespace

Update dense_update(LoraModule & module, const MatrixShape & shape) {
    Update update;
    update.dense.make = [diff = take_scaled(module, static_cast<size_t>(shape.rows * shape.columns()))](
                            const float *, float) { return *diff; };
    return update;
}

// Interpolated, W + m (new − W): inert at 0, and the new value itself at 1.
Update replace_update(LoraModule & module, const MatrixShape & shape) {
    Update update;
    update.dense.needs_base = true;
    update.dense.make = [value = take_scaled(module, static_cast<size_t>(shape.rows * shape.columns()))](
                            const float * base, float) {
        std::vector<float> delta = *value;
        for (size_t i = 0; i < delta.size(); ++i) {
            delta[i] -= base[i];
        }
        return delta;
    };
    return update;
}

Update ia3_update(LoraModule & module, const MatrixShape & shape) {
    Update update;
    auto & scale = module.on_input ? update.input_scale : update.row_scale;
    scale = take_factor(module, "weight", static_cast<size_t>(module.on_input ? shape.inputs : shape.rows));
    for (float & value : scale) {
        value *= static_cast<float>(module.scale);
    }
    return update;
}

} // namespace sd
