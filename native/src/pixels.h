// Pictures in 8 bits to the floats that autoencoders know and back, and masks.
#pragma once

#include "core/tensor.h"

#include <cstdint>
#include <vector>

namespace sd {

// Rows of RGB -> [W, H, 3, 1] in -1..1.
Tensor image_from_rgb(const uint8_t * rgb, int width, int height);

// Image `index` of [W, H, 3, N] in -1..1 -> rows of RGB, rounded and clamped.
void rgb_from_image(const Tensor & images, int64_t index, uint8_t * rgb);

// Rows of grey -> [W / reduction, H / reduction, 1, 1] in 0..1: the mean of each cell.
Tensor latent_mask(const uint8_t * grey, int width, int height, int reduction);

} // namespace sd
