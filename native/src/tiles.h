// Big pictures through the autoencoder in overlapping tiles, blended where they meet.
#pragma once

#include "core/tensor.h"

#include <functional>

namespace sd {

// Applies `function` to tiles of `tile` by `tile` cells of `x` and blends the results linearly over the overlap of
// a quarter. The function maps [w, h, C, N] to [w * up / down, h * up / down, C', N]; tile is a multiple of 4 * down.
// A picture that fits into one tile is passed whole.
Tensor in_tiles(const Tensor & x, int64_t tile, int64_t up, int64_t down,
                const std::function<Tensor(const Tensor &)> & function);

} // namespace sd
