#include "kernels/elementwise.h"

#include <ggml.h>

#include <algorithm>
#include <cstring>

namespace sd {
namespace {

constexpr int64_t floats_at_once = 16384; // 64 kB: more than a thread's call costs, less than a first-level cache or two

float * data(ggml_tensor * tensor) { return static_cast<float *>(tensor->data); }

std::array<int64_t, 4> shape(const ggml_tensor * x) { return {x->ne[0], x->ne[1], x->ne[2], x->ne[3]}; }

// Calls work(first, n) for ranges that make up [0, count).
template <typename Work>
void in_ranges(Pool & pool, int64_t count, int64_t at_once, double operations, const Work & work) {
    pool.run((count + at_once - 1) / at_once, operations,
             [&](int64_t piece, int) { work(piece * at_once, std::min(at_once, count - piece * at_once)); });
}

} // namespace

ggml_tensor * Activate::append_to(ggml_context * ctx) { return append(ctx, shape(x_), {x_}); }

void Activate::run(ggml_tensor * out) {
    in_ranges(pool, ggml_nelements(x_), floats_at_once, 8.0 * static_cast<double>(ggml_nelements(x_)), [&](int64_t first, int64_t n) {
        set.activate(data(x_) + first, data(out) + first, n, activation_);
    });
}

ggml_tensor * Add::append_to(ggml_context * ctx) { return append(ctx, shape(x_), {x_, y_}); }

void Add::run(ggml_tensor * out) {
    in_ranges(pool, ggml_nelements(x_), floats_at_once, 8.0 * static_cast<double>(ggml_nelements(x_)), [&](int64_t first, int64_t n) {
        set.add(data(x_) + first, data(y_) + first, data(out) + first, n);
    });
}

ggml_tensor * ConcatChannels::append_to(ggml_context * ctx) {
    return append(ctx, {x_->ne[0] + y_->ne[0], x_->ne[1], x_->ne[2], x_->ne[3]}, {x_, y_});
}

void ConcatChannels::run(ggml_tensor * out) {
    const int64_t a = x_->ne[0], b = y_->ne[0];
    in_ranges(pool, ggml_nelements(x_) / a, std::max<int64_t>(floats_at_once / (a + b), 1),
              4.0 * static_cast<double>(ggml_nelements(out)), [&](int64_t first, int64_t n) {
        for (int64_t row = first; row < first + n; ++row) {
            float * to = data(out) + row * (a + b);
            std::memcpy(to, data(x_) + row * a, sizeof(float) * static_cast<size_t>(a));
            std::memcpy(to + a, data(y_) + row * b, sizeof(float) * static_cast<size_t>(b));
        }
    });
}

ggml_tensor * Resize::append_to(ggml_context * ctx) { return append(ctx, {x_->ne[0], width_, height_, x_->ne[3]}, {x_}); }

void Resize::run(ggml_tensor * out) {
    const int64_t channels = x_->ne[0];
    pool.run(height_ * x_->ne[3], 4.0 * static_cast<double>(ggml_nelements(out)), [&](int64_t line, int) {
        const int64_t image = line / height_, row = line % height_ * x_->ne[2] / height_;
        const float * from = data(x_) + (image * x_->ne[2] + row) * x_->ne[1] * channels;
        float *       to = data(out) + line * width_ * channels;
        for (int64_t column = 0; column < width_; ++column, to += channels) {
            std::memcpy(to, from + column * x_->ne[1] / width_ * channels, sizeof(float) * static_cast<size_t>(channels));
        }
    });
}

std::string Activate::describe() const { return "activation"; }
std::string Add::describe() const { return "sum"; }
std::string ConcatChannels::describe() const { return "concat"; }
std::string Resize::describe() const { return "resize"; }

} // namespace sd
