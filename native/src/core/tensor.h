// A tensor of floats on the host: latents, conditioning, what the probe takes and gives.
// Shapes are in ggml's order, the fastest dimension first: an image is [W, H, C, N].
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace sd {

using Shape = std::array<int64_t, 4>; // unused dimensions are 1

inline int64_t count(const Shape & ne) { return ne[0] * ne[1] * ne[2] * ne[3]; }

struct Tensor {
    Shape              ne{0, 1, 1, 1};
    std::vector<float> data;

    Tensor() = default;
    explicit Tensor(const Shape & ne) : ne(ne), data(static_cast<size_t>(count(ne))) {}
};

} // namespace sd
