// A cheap picture of a latent: each cell's channels through a linear map to one RGB pixel. The map is fitted to
// the autoencoder at hand, by least squares over a chart of known colours.
#pragma once

#include "core/tensor.h"

#include <cstdint>
#include <vector>

namespace sd {

// Flat patches of the colour cube, [W, H, 3, 1] in -1..1; patches are several cells wide.
Tensor preview_chart(int reduction);

// From the chart and its latent [w, h, C, 1]: [C + 1, 3] coefficients, the last of each a constant.
std::vector<float> fit_preview(const Tensor & chart, const Tensor & latent);

// Image `image` of latents of shape [w, h, C, N] -> w * h pixels.
void paint_preview(const std::vector<float> & map, const std::vector<float> & latents, const Shape & ne, int image,
                   uint8_t * rgb);

} // namespace sd
