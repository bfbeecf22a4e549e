// Operations of diffusion transformers (FLUX, SD3), composed of ggml's own.
#include "nn/graph.h"
#include "nn/kernel_nodes.h"
#include "nn/weights.h"

#include <ggml.h>

namespace sd {

// x sigmoid(2 u) = x/2 (1 + tanh u) with u = sqrt(2/pi) (x + 0.044715 x^3). ggml_gelu looks half-precision
// values up in a table, which costs three digits.
Value Graph::gelu_tanh(Value x) {
    constexpr float linear = 1.5957691216057308f; // 2 sqrt(2/pi)
    Value u = ggml_scale_bias(ctx_, ggml_mul(ctx_, x, x), linear * 0.044715f, linear);
    return ggml_mul(ctx_, x, ggml_sigmoid(ctx_, ggml_mul(ctx_, u, x)));
}

Value Graph::scaled(Value x, float factor) { return ggml_scale(ctx_, x, factor); }

Value Graph::normalise(Value x, float eps) {
    return kernels_ ? kernels_->row_norm(x, nullptr, nullptr, eps, false) : ggml_norm(ctx_, x, eps);
}

Value Graph::rms_norm(const Weight * weight, Value x, float eps) {
    Value scale = vector(weight);
    if (kernels_) {
        return kernels_->row_norm(x, scale, nullptr, eps, true);
    }
    if (scale->ne[1] > 1 && x->ne[3] == scale->ne[1]) { // of an adapter, another per image, over heads
        scale = ggml_reshape_4d(ctx_, scale, scale->ne[0], 1, 1, scale->ne[1]);
    }
    return ggml_mul(ctx_, ggml_rms_norm(ctx_, x, eps), scale->ne[3] > 1 ? scale : over_tokens(scale, x));
}

Value Graph::chunk(Value vectors, int64_t index, int64_t width) {
    return ggml_view_3d(ctx_, vectors, width, 1, vectors->ne[1], vectors->nb[1], vectors->nb[1],
                        static_cast<size_t>(index * width) * vectors->nb[0]);
}

Value Graph::modulate(Value x, Value shift, Value scale) {
    return ggml_add(ctx_, ggml_mul(ctx_, x, ggml_scale_bias(ctx_, ggml_cont(ctx_, scale), 1.0f, 1.0f)),
                    shift);
}

Value Graph::add_gated(Value x, Value y, Value gate) { return ggml_add(ctx_, x, ggml_mul(ctx_, y, gate)); }

Value Graph::by_heads(Value x, int64_t heads) {
    const int64_t size = x->ne[0] / heads;
    return ggml_view_4d(ctx_, x, size, heads, x->ne[1], x->ne[2], static_cast<size_t>(size) * x->nb[0],
                        x->nb[1], x->nb[2], 0);
}

Value Graph::side_by_side(Value x) {
    x = ggml_is_contiguous(x) ? x : ggml_cont(ctx_, x);
    return ggml_reshape_3d(ctx_, x, x->ne[0] * x->ne[1], x->ne[2], x->ne[3]);
}

Value Graph::token_range(Value x, int64_t first, int64_t n) {
    return ggml_view_3d(ctx_, x, x->ne[0], n, x->ne[2], x->nb[1], x->nb[2],
                        static_cast<size_t>(first) * x->nb[1]);
}

Value Graph::concat(Value x, Value y, int dimension) { return ggml_concat(ctx_, x, y, dimension); }

// ggml turns pair i by position * base^(-i) / factor[i]: with a base of 1 the factors are the periods.
Value Graph::rope(Value x, Value positions, Value periods) {
    return ggml_rope_ext(ctx_, x, positions, periods, static_cast<int>(x->ne[0]), GGML_ROPE_TYPE_NORMAL, 0,
                         1.0f, 1.0f, 0.0f, 1.0f, 0.0f, 0.0f);
}

// In both directions a row is cut into pairs, and the two rows of a square are brought together: [2, W/2, 2,
// R] with R = H/2 C N is turned into [2, 2, W/2, R].
Value Graph::patches(Value x) {
    const Shape ne = shape(x);
    x = ggml_is_contiguous(x) ? x : ggml_cont(ctx_, x);
    Value squares = ggml_reshape_4d(ctx_, x, 2, ne[0] / 2, 2, ne[1] / 2 * ne[2] * ne[3]);
    squares = ggml_cont(ctx_, ggml_permute(ctx_, squares, 0, 2, 1, 3));
    squares = ggml_reshape_4d(ctx_, squares, 4, ne[0] / 2 * (ne[1] / 2), ne[2], ne[3]); // [4, T, C, N]
    squares = ggml_cont(ctx_, ggml_permute(ctx_, squares, 0, 2, 1, 3));                 // [4, C, T, N]
    return ggml_reshape_3d(ctx_, squares, 4 * ne[2], ne[0] / 2 * (ne[1] / 2), ne[3]);
}

Value Graph::from_patches(Value x, int64_t width, int64_t height, bool channels_first) {
    const int64_t channels = x->ne[0] / 4, tokens = x->ne[1], images = x->ne[2];
    x = ggml_is_contiguous(x) ? x : ggml_cont(ctx_, x);
    Value squares =
        channels_first
            ? ggml_permute(ctx_, ggml_reshape_4d(ctx_, x, 4, channels, tokens, images), 0, 2, 1, 3)
            : ggml_permute(ctx_, ggml_reshape_4d(ctx_, x, channels, 4, tokens, images), 2, 0, 1, 3);
    squares = ggml_cont(ctx_, squares); // [4, T, C, N]
    squares = ggml_reshape_4d(ctx_, squares, 2, 2, width / 2, height / 2 * channels * images);
    squares = ggml_cont(ctx_, ggml_permute(ctx_, squares, 0, 2, 1, 3));
    return ggml_reshape_4d(ctx_, squares, width, height, channels, images);
}

} // namespace sd
