#include "lora/lora_matrix.h"

#include "core/vectors.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

namespace sd {
namespace {

constexpr int64_t tile_columns = 32, tile_rows = 4, tile_inner = 256;

// One tile of columns: `b` [inner, tile_columns] is packed; `width` columns of c are written.
SD_WIDE_VECTORS void tile_product(float * __restrict c, int64_t c_stride, const float * __restrict a,
                                  int64_t a_stride, const float * __restrict b, int64_t rows, int64_t inner,
                                  int64_t width, float factor) {
    for (int64_t row = 0; row < rows; row += tile_rows) {
        const int64_t n = std::min(tile_rows, rows - row);
        const float * a0 = a + row * a_stride;
        const float * a1 = a0 + (n > 1 ? a_stride : 0); // beyond the last row: computed, and not written
        const float * a2 = a0 + (n > 2 ? 2 * a_stride : 0);
        const float * a3 = a0 + (n > 3 ? 3 * a_stride : 0);
        float sum[tile_rows][tile_columns] = {};
        for (int64_t k = 0; k < inner; ++k) {
            const float * line = b + k * tile_columns;
            for (int64_t j = 0; j < tile_columns; ++j) {
                sum[0][j] += a0[k] * line[j];
                sum[1][j] += a1[k] * line[j];
                sum[2][j] += a2[k] * line[j];
                sum[3][j] += a3[k] * line[j];
            }
        }
        for (int64_t i = 0; i < n; ++i) {
            float * to = c + (row + i) * c_stride;
            for (int64_t j = 0; j < width; ++j) {
                to[j] += factor * sum[i][j];
            }
        }
    }
}

} // namespace

void add_product(float * c, const float * a, const float * b, int64_t rows, int64_t inner, int64_t columns,
                 float factor) {
    float packed[tile_inner * tile_columns];
    for (int64_t first = 0; first < columns; first += tile_columns) {
        const int64_t width = std::min(tile_columns, columns - first);
        for (int64_t k = 0; k < inner; k += tile_inner) {
            const int64_t depth = std::min(tile_inner, inner - k);
            if (width < tile_columns) {
                std::fill_n(packed, depth * tile_columns, 0.0f);
            }
            for (int64_t i = 0; i < depth; ++i) {
                std::copy_n(b + (k + i) * columns + first, width, packed + i * tile_columns);
            }
            tile_product(c + first, columns, a + k, inner, packed, rows, depth, width, factor);
        }
    }
}

std::vector<float> product(const std::vector<float> & a, const std::vector<float> & b, int64_t rows,
                           int64_t inner, int64_t columns) {
    std::vector<float> c(static_cast<size_t>(rows * columns));
    add_product(c.data(), a.data(), b.data(), rows, inner, columns, 1.0f);
    return c;
}

std::vector<float> transposed(const std::vector<float> & a, int64_t rows, int64_t columns) {
    std::vector<float> out(a.size());
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) {
            out[j * rows + i] = a[i * columns + j];
        }
    }
    return out;
}

std::vector<float> contracted(const std::vector<float> & core, const std::vector<float> & factor, int64_t p,
                              int64_t q, int64_t columns, int64_t taps) {
    std::vector<float> out(static_cast<size_t>(p * columns * taps));
    for (int64_t i = 0; i < p; ++i) {
        for (int64_t j = 0; j < columns; ++j) {
            float * to = out.data() + (i * columns + j) * taps;
            for (int64_t k = 0; k < q; ++k) {
                const float * from = core.data() + (i * q + k) * taps;
                for (int64_t t = 0; t < taps; ++t) {
                    to[t] += from[t] * factor[k * columns + j];
                }
            }
        }
    }
    return out;
}

std::vector<double> cayley(const std::vector<double> & q, int64_t n) {
    // X (I − q) = I + q, transposed: (I − q)ᵀ Xᵀ = (I + q)ᵀ, by elimination with pivots.
    std::vector<double> left(q.size()), right(q.size());
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < n; ++j) {
            left[i * n + j] = (i == j) - q[j * n + i];
            right[i * n + j] = (i == j) + q[j * n + i];
        }
    }
    for (int64_t k = 0; k < n; ++k) {
        int64_t pivot = k;
        for (int64_t i = k + 1; i < n; ++i) {
            pivot = std::abs(left[i * n + k]) > std::abs(left[pivot * n + k]) ? i : pivot;
        }
        if (pivot != k) {
            std::swap_ranges(&left[k * n], &left[k * n] + n, &left[pivot * n]);
            std::swap_ranges(&right[k * n], &right[k * n] + n, &right[pivot * n]);
        }
        for (int64_t i = 0; i < n; ++i) {
            const double share = i == k ? 0 : left[i * n + k] / left[k * n + k];
            if (share != 0) {
                for (int64_t j = 0; j < n; ++j) {
                    left[i * n + j] -= share * left[k * n + j];
                    right[i * n + j] -= share * right[k * n + j];
                }
            }
        }
    }
    std::vector<double> x(q.size());
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < n; ++j) {
            x[j * n + i] = right[i * n + j] / left[i * n + i];
        }
    }
    return x;
}

} // namespace sd
