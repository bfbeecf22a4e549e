// FLUX.1 Redux (Black Forest Labs, 2024): a picture as tokens that stand behind those of the text.
#pragma once

#include "models/siglip.h"

#include <optional>

namespace sd {

struct Redux {
    Scope   vision_scope, here;
    int64_t context; // features of the text's tokens

    Siglip vision{vision_scope};
    Linear up{here.at("redux_up"), vision.c.width, 3 * context};
    Linear down{here.at("redux_down"), 3 * context, context};

    // None where neither of its two files is given. Throws Error(bad_file) where one is, and what is missing.
    static std::optional<Redux> find(const WeightStore & weights, const Scope & vision, const Scope & here,
                                     int64_t context);

    // Input "image" [side, side, 3, N] -> [context, squares, N].
    Value operator()(Graph & g, Value image) const { return down(g, g.silu(up(g, vision(g, image)))); }
};

} // namespace sd
