#include "tiles.h"

#include <algorithm>
#include <vector>

namespace sd {
namespace {

// Where tiles begin: evenly, the last ending at the edge, each overlapping the next by a quarter or more.
std::vector<int64_t> starts(int64_t length, int64_t tile, int64_t grain) {
    std::vector<int64_t> out{0};
    const int64_t        step = std::max(grain, tile * 3 / 4 / grain * grain);
    while (out.back() + tile < length) {
        out.push_back(std::min(out.back() + step, length - tile));
    }
    return out;
}

Tensor crop(const Tensor & x, int64_t left, int64_t top, int64_t width, int64_t height) {
    Tensor out({width, height, x.ne[2], x.ne[3]});
    for (int64_t plane = 0; plane < x.ne[2] * x.ne[3]; ++plane) {
        for (int64_t row = 0; row < height; ++row) {
            const float * from = x.data.data() + (plane * x.ne[1] + top + row) * x.ne[0] + left;
            std::copy(from, from + width, out.data.data() + (plane * height + row) * width);
        }
    }
    return out;
}

// Rises over the overlap from an inner edge; 1 along the picture's own edges.
float ramp(int64_t at, int64_t length, int64_t overlap, bool from_edge, bool to_edge) {
    const float rise = from_edge ? 1.0f : static_cast<float>(at + 1) / static_cast<float>(overlap + 1);
    const float fall = to_edge ? 1.0f : static_cast<float>(length - at) / static_cast<float>(overlap + 1);
    return std::min({rise, fall, 1.0f});
}

} // namespace

Tensor in_tiles(const Tensor & x, int64_t tile, int64_t up, int64_t down,
                const std::function<Tensor(const Tensor &)> & function) {
    const int64_t tile_w = std::min(tile, x.ne[0]), tile_h = std::min(tile, x.ne[1]);
    if (tile_w == x.ne[0] && tile_h == x.ne[1]) {
        return function(x);
    }
    const auto         scaled = [&](int64_t cells) { return cells * up / down; };
    Tensor             out;
    std::vector<float> weights(static_cast<size_t>(scaled(x.ne[0]) * scaled(x.ne[1])));
    for (const int64_t top : starts(x.ne[1], tile_h, down)) {
        for (const int64_t left : starts(x.ne[0], tile_w, down)) {
            const Tensor part = function(crop(x, left, top, tile_w, tile_h));
            if (out.data.empty()) {
                out = Tensor({scaled(x.ne[0]), scaled(x.ne[1]), part.ne[2], part.ne[3]});
            }
            const int64_t w = part.ne[0], h = part.ne[1];
            for (int64_t row = 0; row < h; ++row) {
                const float vertical = ramp(row, h, h / 4, top == 0, top + tile_h == x.ne[1]);
                for (int64_t column = 0; column < w; ++column) {
                    const float weight = vertical * ramp(column, w, w / 4, left == 0, left + tile_w == x.ne[0]);
                    const int64_t at = (scaled(top) + row) * out.ne[0] + scaled(left) + column;
                    weights[at] += weight;
                    for (int64_t plane = 0; plane < part.ne[2] * part.ne[3]; ++plane) {
                        out.data[plane * out.ne[0] * out.ne[1] + at] += weight * part.data[(plane * h + row) * w + column];
                    }
                }
            }
        }
    }
    for (size_t i = 0; i < out.data.size(); ++i) {
        out.data[i] /= weights[i % weights.size()];
    }
    return out;
}

} // namespace sd
