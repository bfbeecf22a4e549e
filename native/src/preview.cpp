#include "preview.h"

#include "pixels.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace sd {
namespace {

constexpr int patches = 8; // in a row and in a column
constexpr int cells = 3;   // of a patch's side; only the middle one is unaffected by its neighbours

// Solves a x = b for each of three right sides by Gaussian elimination with pivoting; a is n by n, b n by 3.
std::vector<double> solve(std::vector<double> a, std::vector<double> b, size_t n) {
    for (size_t column = 0; column < n; ++column) {
        size_t pivot = column;
        for (size_t row = column + 1; row < n; ++row) {
            pivot = std::abs(a[row * n + column]) > std::abs(a[pivot * n + column]) ? row : pivot;
        }
        std::swap_ranges(a.begin() + pivot * n, a.begin() + (pivot + 1) * n, a.begin() + column * n);
        std::swap_ranges(b.begin() + pivot * 3, b.begin() + (pivot + 1) * 3, b.begin() + column * 3);
        for (size_t row = 0; row < n; ++row) {
            if (row == column) {
                continue;
            }
            const double factor = a[row * n + column] / a[column * n + column];
            for (size_t i = column; i < n; ++i) {
                a[row * n + i] -= factor * a[column * n + i];
            }
            for (size_t i = 0; i < 3; ++i) {
                b[row * 3 + i] -= factor * b[column * 3 + i];
            }
        }
    }
    for (size_t row = 0; row < n; ++row) {
        for (size_t i = 0; i < 3; ++i) {
            b[row * 3 + i] /= a[row * n + row];
        }
    }
    return b;
}

} // namespace

Tensor preview_chart(int reduction) {
    const int patch = cells * reduction, side = patches * patch;
    Tensor    chart({side, side, 3, 1});
    for (int y = 0; y < side; ++y) {
        for (int x = 0; x < side; ++x) {
            const int index = y / patch * patches + x / patch; // 4 levels of each colour: 64 patches
            const int levels[3] = {index % 4, index / 4 % 4, index / 16};
            for (int channel = 0; channel < 3; ++channel) {
                chart.data[(channel * side + y) * side + x] = static_cast<float>(levels[channel]) / 1.5f - 1.0f;
            }
        }
    }
    return chart;
}

std::vector<float> fit_preview(const Tensor & chart, const Tensor & latent) {
    const size_t        n = static_cast<size_t>(latent.ne[2]) + 1;
    const int64_t       w = latent.ne[0], plane = w * latent.ne[1], reduction = chart.ne[0] / w;
    std::vector<double> normal(n * n), right(n * 3);
    for (size_t i = 0; i < n; ++i) {
        normal[i * n + i] = 1e-3; // keeps channels that the chart does not move from blowing up
    }
    for (int64_t y = cells / 2; y < latent.ne[1]; y += cells) {
        for (int64_t x = cells / 2; x < w; x += cells) {
            std::vector<double> row(n, 1.0);
            for (size_t i = 0; i + 1 < n; ++i) {
                row[i] = latent.data[i * plane + y * w + x];
            }
            for (size_t i = 0; i < n; ++i) {
                for (size_t j = 0; j < n; ++j) {
                    normal[i * n + j] += row[i] * row[j];
                }
                for (size_t channel = 0; channel < 3; ++channel) {
                    right[i * 3 + channel] += row[i] * chart.data[(channel * chart.ne[1] + y * reduction) * chart.ne[0] + x * reduction];
                }
            }
        }
    }
    const std::vector<double> map = solve(std::move(normal), std::move(right), n);
    return {map.begin(), map.end()};
}

void paint_preview(const std::vector<float> & map, const std::vector<float> & latents, const Shape & ne, int image,
                   uint8_t * rgb) {
    const int64_t plane = ne[0] * ne[1];
    Tensor        picture({ne[0], ne[1], 3, 1});
    for (int64_t channel = 0; channel < 3; ++channel) {
        for (int64_t at = 0; at < plane; ++at) {
            float value = map[ne[2] * 3 + channel];
            for (int64_t i = 0; i < ne[2]; ++i) {
                value += map[i * 3 + channel] * latents[(image * ne[2] + i) * plane + at];
            }
            picture.data[channel * plane + at] = value;
        }
    }
    rgb_from_image(picture, 0, rgb);
}

} // namespace sd
