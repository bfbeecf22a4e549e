// GLoRA: scale · ((W a1) a2 + b1 b2) (Chavan et al., 2023, "One-for-All").
#include "lora/lora_formats.h"
#include "lora/lora_matrix.h"

namespace sd {
namespace {

// W a for each tap: [rows, inputs, taps] and [inputs, rank] -> [rows, rank, taps].
std::vector<float> through(const float * base, const std::vector<float> & a, const MatrixShape & shape,
                           int64_t rank) {
    std::vector<float> out(static_cast<size_t>(shape.rows * rank * shape.taps));
    for (int64_t i = 0; i < shape.rows; ++i) {
        for (int64_t j = 0; j < shape.inputs; ++j) {
            for (int64_t p = 0; p < rank; ++p) {
                for (int64_t t = 0; t < shape.taps; ++t) {
                    out[(i * rank + p) * shape.taps + t] +=
                        base[(i * shape.inputs + j) * shape.taps + t] * a[j * rank + p];
                }
            }
        }
    }
    return out;
}

} // namespace

Update glora_update(LoraModule & module, const MatrixShape & shape, const std::vector<float> & base) {
    const int64_t rank = dimension(module, "a1", 1);
    const auto rows = static_cast<size_t>(shape.rows), inputs = static_cast<size_t>(shape.inputs);
    const auto r = static_cast<size_t>(rank);
    const auto a = take_factor(module, "a1", inputs * r);
    const auto after = take_factor(module, "a2", r * inputs);
    std::vector<float> b = take_factor(module, "b1", rows * r);
    std::vector<float> down; // [rank, columns]
    if (has_factor(module, "bm")) {
        const auto core = take_factor(module, "bm", r * r * static_cast<size_t>(shape.taps));
        down = contracted(core, take_factor(module, "b2", r * inputs), rank, rank, shape.inputs, shape.taps);
    } else {
        down = take_factor(module, "b2", r * static_cast<size_t>(shape.columns()));
    }
    const auto scale = static_cast<float>(module.scale);
    Update update;

    if (shape.taps == 1) { // W a1 and b1 side by side over a2 and b2: low-rank as well
        const std::vector<float> left = through(base.data(), a, shape, rank);
        update.rank = 2 * rank;
        for (size_t i = 0; i < rows; ++i) {
            for (size_t p = 0; p < r; ++p) {
                update.up.push_back(scale * left[i * r + p]);
            }
            for (size_t p = 0; p < r; ++p) {
                update.up.push_back(scale * b[i * r + p]);
            }
        }
        update.down = after;
        update.down.insert(update.down.end(), down.begin(), down.end());
        return update;
    }

    // (W a1) has the kernel's taps and a2 has none: a convolution of 1x1 before one of W's size, which is no
    // pair.
    update.dense.needs_base = true;
    update.dense.make = [a, after, b, down, shape, rank, scale](const float * w, float) {
        std::vector<float> delta = product(b, down, shape.rows, rank, shape.columns());
        const std::vector<float> left = through(w, a, shape, rank);
        for (int64_t i = 0; i < shape.rows; ++i) {
            for (int64_t p = 0; p < rank; ++p) {
                for (int64_t j = 0; j < shape.inputs; ++j) {
                    for (int64_t t = 0; t < shape.taps; ++t) {
                        delta[(i * shape.inputs + j) * shape.taps + t] +=
                            left[(i * rank + p) * shape.taps + t] * after[p * shape.inputs + j];
                    }
                }
            }
        }
        for (float & value : delta) {
            value *= scale;
        }
        return delta;
    };
    return update;
}

} // namespace sd
