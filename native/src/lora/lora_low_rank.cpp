// LoRA and LoCon: scale · up · down, with an optional Tucker core between the two.
#include "lora/lora_formats.h"
#include "lora/lora_matrix.h"

namespace sd {

Update low_rank_update(LoraModule & module, const MatrixShape & shape) {
    Update update;
    const int64_t rank = dimension(module, "up", 1), rows = shape.rows;
    update.rank = rank;
    update.up = take_factor(module, "up", static_cast<size_t>(rows * rank));
    if (has_factor(module, "mid")) {
        const int64_t inner = dimension(module, "mid", 1);
        const auto core = take_factor(module, "mid", static_cast<size_t>(rank * inner * shape.taps));
        const auto down = take_factor(module, "down", static_cast<size_t>(inner * shape.inputs));
        update.down = contracted(core, down, rank, inner, shape.inputs, shape.taps);
    } else {
        update.down = take_factor(module, "down", static_cast<size_t>(rank * shape.columns()));
    }
    for (float & value : update.up) {
        value *= static_cast<float>(module.scale);
    }
    return update;
}

} // namespace sd
