// DoRA: W + delta, brought to stored norms of its rows or of its inputs' columns (Liu et al., 2024). With a
// multiplier m the weight is W + m (W' − W): inert at 0, W' itself at 1.
#include "core/error.h"
#include "lora/lora_formats.h"

#include <algorithm>
#include <cmath>
#include <memory>

namespace sd {
namespace {

// The stored norms over those of W + delta.
std::vector<float> gains(const std::vector<float> & v, const std::vector<float> & magnitude,
                         const MatrixShape & shape, bool of_columns) {
    std::vector<double> squares(magnitude.size());
    for (int64_t i = 0; i < shape.rows; ++i) {
        for (int64_t j = 0; j < shape.columns(); ++j) {
            const double value = v[i * shape.columns() + j];
            squares[of_columns ? j / shape.taps : i] += value * value;
        }
    }
    std::vector<float> out(magnitude.size());
    for (size_t i = 0; i < out.size(); ++i) {
        out[i] = static_cast<float>(magnitude[i] / std::max(std::sqrt(squares[i]), 1e-12));
    }
    return out;
}

std::vector<float> less_one(std::vector<float> values) {
    for (float & value : values) {
        value -= 1.0f;
    }
    return values;
}

} // namespace

Update dora_update(Update && update, const Factor & magnitude, bool of_columns,
                   const std::vector<float> & base) {
    const MatrixShape shape = update.shape;
    const int64_t columns = shape.columns();
    if (magnitude.data.size() != static_cast<size_t>(of_columns ? shape.inputs : shape.rows)) {
        fail(Status::bad_file, "%s: a DoRA of %zu magnitudes does not fit the %lld %s of its weight",
             update.stem.c_str(), magnitude.data.size(),
             static_cast<long long>(of_columns ? shape.inputs : shape.rows), of_columns ? "inputs" : "rows");
    }
    std::vector<float> v = delta_of(update, base.data(), 1.0f);
    for (size_t i = 0; i < v.size(); ++i) {
        v[i] += base[i];
    }
    std::vector<float> gain = gains(v, magnitude.data, shape, of_columns);

    const bool pair_alone = !update.dense.make && update.kronecker.a.empty() && update.row_scale.empty() &&
                            update.input_scale.empty() && columns > 1;
    if (pair_alone) { // g (W + up down) − W = (g − 1) W + (g up) down, and likewise for inputs
        if (of_columns) {
            for (int64_t p = 0; p < update.rank; ++p) {
                for (int64_t j = 0; j < columns; ++j) {
                    update.down[p * columns + j] *= gain[j / shape.taps];
                }
            }
            update.input_scale = less_one(std::move(gain));
        } else {
            for (int64_t i = 0; i < shape.rows; ++i) {
                for (int64_t p = 0; p < update.rank; ++p) {
                    update.up[i * update.rank + p] *= gain[i];
                }
            }
            update.row_scale = less_one(std::move(gain));
        }
        return std::move(update);
    }

    Update dense;
    dense.dense.needs_base = true;
    dense.dense.make = [inner = std::make_shared<Update>(std::move(update)), gain,
                        of_columns](const float * w, float) {
        std::vector<float> delta = delta_of(*inner, w, 1.0f);
        const int64_t n = inner->shape.columns(), taps = inner->shape.taps;
        for (int64_t i = 0; i < inner->shape.rows; ++i) {
            for (int64_t j = 0; j < n; ++j) {
                const float g = gain[of_columns ? j / taps : i];
                delta[i * n + j] = g * (w[i * n + j] + delta[i * n + j]) - w[i * n + j];
            }
        }
        return delta;
    };
    return dense;
}

} // namespace sd
