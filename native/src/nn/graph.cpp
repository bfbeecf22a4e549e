#include "nn/graph.h"

#include "core/error.h"
#include "nn/device.h"
#include "nn/kernel_nodes.h"
#include "nn/weights.h"

#include <ggml.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace sd {

// Attention scores are the largest activation; beyond this many bytes they are made in parts.
constexpr int64_t max_score_bytes = 128 << 20;

Graph::Graph(ggml_context * ctx, ggml_cgraph * nodes, const Device & device, const Shapes & inputs, const Adapters * adapters)
    : ctx_(ctx), nodes_(nodes), device_(device), input_shapes_(inputs), adapters_(adapters),
      kernels_(device.kernels() ? std::make_unique<KernelNodes>(ctx, *device.kernels(), device.pool()) : nullptr) {}

Graph::~Graph() = default;

Shape Graph::shape(Value value) { return {value->ne[0], value->ne[1], value->ne[2], value->ne[3]}; }

std::pair<std::string, double> Graph::describe(const ggml_tensor * node) const {
    if (const Operation * operation = kernels_ ? kernels_->operation(node) : nullptr) {
        return {operation->describe(), operation->flops()};
    }
    double per_element = 0;
    if (node->op == GGML_OP_MUL_MAT) {
        per_element = 2.0 * static_cast<double>(node->src[0]->ne[0]);
    } else if (node->op == GGML_OP_CONV_2D) {
        per_element = 2.0 * static_cast<double>(ggml_nelements(node->src[0]) / node->src[0]->ne[3]);
    } else if (node->op == GGML_OP_FLASH_ATTN_EXT) {
        per_element = 4.0 * static_cast<double>(node->src[1]->ne[1]);
    }
    return {std::string("ggml ") + ggml_op_desc(node), per_element * static_cast<double>(ggml_nelements(node))};
}

static Value new_input(ggml_context * ctx, ggml_type type, const Shape & ne) {
    Value value = ggml_new_tensor_4d(ctx, type, ne[0], ne[1], ne[2], ne[3]);
    ggml_set_input(value);
    return value;
}

Value Graph::input(const std::string & name) { return inputs_[name] = new_input(ctx_, GGML_TYPE_F32, shape_of(name)); }

Value Graph::input_ids(const std::string & name) {
    return inputs_[name] = new_input(ctx_, GGML_TYPE_I32, shape_of(name));
}

const Shape & Graph::shape_of(const std::string & input) const {
    const auto found = input_shapes_.find(input);
    if (found == input_shapes_.end()) {
        fail(Status::bad_argument, "this network needs an input named '%s'", input.c_str());
    }
    return found->second;
}

Value Graph::constant(Tensor values) {
    Value value = new_input(ctx_, GGML_TYPE_F32, values.ne);
    constants_.push_back({value, std::move(values)});
    return value;
}

Value Graph::constant_ids(Tensor values) {
    Value value = new_input(ctx_, GGML_TYPE_I32, values.ne);
    constants_.push_back({value, std::move(values)});
    return value;
}

void Graph::output(const std::string & name, Value value) {
    value = ggml_cont(ctx_, value); // a view has no memory of its own to be read from
    ggml_set_output(value);
    ggml_build_forward_expand(nodes_, value);
    outputs_[name] = value;
}

// ---- products with weights -----------------------------------------------------------------------------

ggml_tensor * Graph::resident(const Weight * weight) {
    weights_.insert(weight);
    return weight->tensor;
}

Value Graph::multiply(ggml_tensor * weight, Value x) {
    return kernels_ && Product::can(weight) ? kernels_->product({{{weight, x}}}) : ggml_mul_mat(ctx_, weight, x);
}

Value Graph::multiply(ggml_tensor * kernel, Value x, int stride, int pad) {
    if (!kernels_) {
        return plain_conv2d(kernel, x, stride, pad);
    }
    if (Product::can(kernel)) {
        return kernels_->product({{{kernel, x, stride, pad}}});
    }
    return picture(plain_conv2d(kernel, planes(x), stride, pad));
}

Value Graph::linear(const Weight * weight, const Weight * bias, Value x) {
    multiplied_.emplace_back(weight, x);
    const Adapter * adapted = adapter(weight);
    if (kernels_ && Product::can(weight->tensor) && low_rank_at_most(adapted)) {
        return fused(adapted, weight, bias, x, 1, 0);
    }
    Value y = adapted ? adapted_linear(*adapted, weight, x) : multiply(resident(weight), x);
    return bias ? ggml_add(ctx_, y, over_tokens(vector(bias), y)) : y;
}

// ggml rounds x to f16 where the weight is f16, and to infinity beyond that: rows go in with a root mean square of 1 and
// come out by that much larger. Our own kernels keep the range of f32.
Value Graph::linear_of_large(const Weight * weight, Value x) {
    if (kernels_ && Product::can(weight->tensor)) {
        return linear(weight, nullptr, x);
    }
    Value size = ggml_sqrt(ctx_, ggml_mean(ctx_, ggml_sqr(ctx_, x))); // [1, T, N]
    Value y = linear(weight, nullptr, ggml_rms_norm(ctx_, x, std::numeric_limits<float>::min()));
    return ggml_mul(ctx_, y, size);
}

Value Graph::plain_conv2d(ggml_tensor * kernel, Value x, int stride, int pad) {
    // The direct form gathers a few rows at a time; the other writes the gathered picture, nine times the size
    // of x, but is the one that every device knows.
    if (device_.is_cpu()) {
        return ggml_conv_2d_direct(ctx_, kernel, x, stride, stride, pad, pad, 1, 1);
    }
    // As ggml_conv_2d, which however rounds what it gathers to f16 even where the kernel is f32.
    const ggml_type type = kernel->type == GGML_TYPE_F16 ? GGML_TYPE_F16 : GGML_TYPE_F32;
    Value gathered = ggml_im2col(ctx_, kernel, x, stride, stride, pad, pad, 1, 1, true, type); // [in*k*k, W', H', N]
    const int64_t patch = gathered->ne[0], width = gathered->ne[1], height = gathered->ne[2], images = gathered->ne[3];
    Value         y = ggml_mul_mat(ctx_, ggml_reshape_2d(ctx_, gathered, patch, width * height * images),
                                   ggml_reshape_2d(ctx_, kernel, patch, kernel->ne[3]));
    y = ggml_reshape_4d(ctx_, y, width, height, images, kernel->ne[3]);
    return ggml_cont(ctx_, ggml_permute(ctx_, y, 0, 1, 3, 2));
}

Value Graph::conv2d(const Weight * kernel, const Weight * bias, Value x, int stride, int pad) {
    const Adapter * adapted = adapter(kernel);
    if (kernels_ && Product::can(kernel->tensor) && low_rank_at_most(adapted)) {
        return fused(adapted, kernel, bias, x, stride, pad);
    }
    Value y = adapted ? adapted_conv2d(*adapted, kernel, x, stride, pad) : multiply(resident(kernel), x, stride, pad);
    return bias ? ggml_add(ctx_, y, over_channels(vector(bias))) : y;
}

Value Graph::embedding(const Weight * table, Value ids) {
    const Shape     ne = shape(ids);
    const Adapter * adapted = adapter(table);
    Value           flat = ggml_reshape_1d(ctx_, ids, ggml_nelements(ids));
    if (adapted) {
        return adapted_rows(*adapted, table, flat, ne);
    }
    Value rows = ggml_get_rows(ctx_, resident(table), flat);
    return ggml_reshape_4d(ctx_, rows, rows->ne[0], ne[0], ne[1], ne[2]);
}

// ---- norms and activations -----------------------------------------------------------------------------

Value Graph::group_norm(const Weight * weight, const Weight * bias, Value x, int groups, float eps) {
    if (kernels_) {
        return kernels_->group_norm(x, vector(weight), vector(bias), groups, eps);
    }
    x = ggml_group_norm(ctx_, x, groups, eps);
    return ggml_add(ctx_, ggml_mul(ctx_, x, over_channels(vector(weight))), over_channels(vector(bias)));
}

Value Graph::layer_norm(const Weight * weight, const Weight * bias, Value x, float eps) {
    if (kernels_) {
        return kernels_->row_norm(x, vector(weight), vector(bias), eps, false);
    }
    x = ggml_norm(ctx_, x, eps);
    return ggml_add(ctx_, ggml_mul(ctx_, x, over_tokens(vector(weight), x)), over_tokens(vector(bias), x));
}

Value Graph::silu(Value x) { return kernels_ ? kernels_->activate(x, Activation::silu) : ggml_silu(ctx_, x); }

Value Graph::gelu(Value x) { return kernels_ ? kernels_->activate(x, Activation::gelu) : ggml_gelu_erf(ctx_, x); }

Value Graph::quick_gelu(Value x) {
    if (kernels_) {
        return kernels_->activate(x, Activation::quick_gelu);
    }
    // ggml_gelu_quick looks half-precision values up in a table, which costs three digits.
    return ggml_mul(ctx_, x, ggml_sigmoid(ctx_, ggml_scale(ctx_, x, 1.702f)));
}

Value Graph::geglu(Value x) {
    if (Value gated = kernels_ ? kernels_->geglu(x) : nullptr) {
        return gated;
    }
    const int64_t half = x->ne[0] / 2;
    const auto    part = [&](int64_t first) {
        return ggml_view_4d(ctx_, x, half, x->ne[1], x->ne[2], x->ne[3], x->nb[1], x->nb[2], x->nb[3],
                            static_cast<size_t>(first) * x->nb[0]);
    };
    return ggml_geglu_erf_split(ctx_, part(half), part(0));
}

Value Graph::add(Value x, Value y) { return kernels_ ? kernels_->add(x, y) : ggml_add(ctx_, x, y); }

Value Graph::mul(Value x, Value y) { return ggml_mul(ctx_, x, y); }

Value Graph::add_to_channels(Value x, Value y) {
    if (kernels_) {
        return kernels_->add_per_image(x, y);
    }
    return ggml_add(ctx_, x, ggml_reshape_4d(ctx_, y, 1, 1, y->ne[0], y->ne[1]));
}

// ---- attention -----------------------------------------------------------------------------------------

// Heads apart, [size, T, heads, N] -> [size, heads, Tq, N].
Value Graph::attention_block(Value q, Value k, Value v, float scale, Value mask) {
    Value scores = ggml_mul_mat(ctx_, k, q); // [Tk, Tq, heads, N]
    ggml_mul_mat_set_prec(scores, GGML_PREC_F32);
    scores = ggml_soft_max_ext(ctx_, scores, mask, scale, 0.0f);
    Value columns = ggml_cont(ctx_, ggml_permute(ctx_, v, 1, 0, 2, 3)); // [Tk, size, heads, N]
    Value out = ggml_mul_mat(ctx_, columns, scores);                    // [size, Tq, heads, N]
    return ggml_cont(ctx_, ggml_permute(ctx_, out, 0, 2, 1, 3));
}

Value Graph::attention(Value q, Value k, Value v, int64_t heads, Value mask) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(q->ne[0] / heads));
    return attention_scaled(q, k, v, heads, scale, mask);
}

Value Graph::attention_scaled(Value q, Value k, Value v, int64_t heads, float scale, Value mask) {
    const int64_t width = q->ne[0], size = width / heads, images = q->ne[2];
    if (kernels_ && (!mask || mask->ne[3] == 1)) {
        return kernels_->attention(q, k, v, heads, scale, mask);
    }
    const auto    apart = [&](Value x, int64_t first_head, int64_t n_heads, int64_t first_image, int64_t n_images) {
        Value part = ggml_view_4d(ctx_, x, size, n_heads, x->ne[1], n_images, size * x->nb[0], x->nb[1], x->nb[2],
                                     first_head * size * x->nb[0] + first_image * x->nb[2]);
        return ggml_permute(ctx_, part, 0, 2, 1, 3); // [size, T, heads, N]
    };
    if (device_.is_cpu() && !mask) { // ggml's tiled kernel for the CPU never holds the scores, and keeps f32
        Value out = ggml_flash_attn_ext(ctx_, apart(q, 0, heads, 0, images), apart(k, 0, heads, 0, images),
                                        apart(v, 0, heads, 0, images), nullptr, scale, 0.0f, 0.0f);
        ggml_flash_attn_ext_set_prec(out, GGML_PREC_F32);
        return ggml_reshape_3d(ctx_, out, width, q->ne[1], images);
    }

    const auto mask_of = [&](int64_t head, int64_t n_heads, int64_t image, int64_t n_images) {
        const bool by_image = mask && mask->ne[3] > 1;
        if (!mask || mask->ne[2] == 1 || (n_heads == heads && (!by_image || n_images == images))) {
            return mask;
        }
        return ggml_cont(ctx_, ggml_view_4d(ctx_, mask, mask->ne[0], mask->ne[1], n_heads, by_image ? n_images : 1, mask->nb[1],
                                            mask->nb[2], mask->nb[3], head * mask->nb[2] + (by_image ? image * mask->nb[3] : 0)));
    };
    const auto block = [&](int64_t head, int64_t n_heads, int64_t image, int64_t n_images) {
        return attention_block(apart(q, head, n_heads, image, n_images), apart(k, head, n_heads, image, n_images),
                               apart(v, head, n_heads, image, n_images), scale, mask_of(head, n_heads, image, n_images));
    };

    const int64_t one_head = q->ne[1] * k->ne[1] * static_cast<int64_t>(sizeof(float));
    Value         out = nullptr;
    if (one_head * heads * images <= max_score_bytes) {
        out = block(0, heads, 0, images);
    } else {
        const int64_t at_once = std::clamp<int64_t>(max_score_bytes / one_head, 1, heads);
        for (int64_t image = 0; image < images; ++image) {
            Value whole = nullptr;
            for (int64_t head = 0; head < heads; head += at_once) {
                Value part = block(head, std::min(at_once, heads - head), image, 1);
                whole = whole ? ggml_concat(ctx_, whole, part, 1) : part;
            }
            out = out ? ggml_concat(ctx_, out, whole, 3) : whole;
        }
    }
    return ggml_reshape_3d(ctx_, out, width, q->ne[1], images);
}

Value Graph::mask_by_head(Value bias, Value seen) {
    Value mask = ggml_cont(ctx_, ggml_permute(ctx_, bias, 2, 0, 1, 3)); // [Tk, Tq, heads]
    if (!seen) {
        return mask;
    }
    // Scores are of the size of a network's activations: 1e9 is out of sight of all others, and 0 where seen.
    const int64_t n = seen->ne[0], images = seen->ne[1];
    Value         hidden = ggml_reshape_4d(ctx_, ggml_scale_bias(ctx_, seen, 1e9f, -1e9f), n, 1, 1, images);
    return ggml_add(ctx_, ggml_repeat_4d(ctx_, mask, n, mask->ne[1], mask->ne[2], images), hidden);
}

// ---- layout --------------------------------------------------------------------------------------------

Value Graph::picture(Value planes) {
    return kernels_ ? ggml_cont(ctx_, ggml_permute(ctx_, planes, 1, 2, 0, 3)) : planes;
}

Value Graph::planes(Value picture) {
    return kernels_ ? ggml_cont(ctx_, ggml_permute(ctx_, picture, 2, 0, 1, 3)) : picture;
}

std::array<int64_t, 2> Graph::size(Value picture) const {
    return kernels_ ? std::array{picture->ne[1], picture->ne[2]} : std::array{picture->ne[0], picture->ne[1]};
}

Value Graph::concat_channels(Value x, Value y) {
    return kernels_ ? kernels_->concat_channels(x, y) : ggml_concat(ctx_, x, y, 2);
}

Value Graph::concat_features(Value x, Value y) { return ggml_concat(ctx_, x, y, 0); }

Value Graph::part(Value x, int64_t first, int64_t n) {
    return ggml_view_4d(ctx_, x, n, x->ne[1], x->ne[2], x->ne[3], x->nb[1], x->nb[2], x->nb[3],
                        static_cast<size_t>(first) * x->nb[0]);
}

Value Graph::gather(Value x, Value ids) {
    return ggml_get_rows(ctx_, ggml_reshape_2d(ctx_, x, x->ne[0], x->ne[1] * x->ne[2]), ids);
}

Value Graph::flatten(Value x, int64_t n) { return ggml_reshape_2d(ctx_, x, x->ne[0] * n, x->ne[1] / n); }

Value Graph::upsample(Value x, int64_t width, int64_t height) {
    if (kernels_) {
        return kernels_->resize(x, width, height);
    }
    return ggml_interpolate(ctx_, x, width, height, x->ne[2], x->ne[3], GGML_SCALE_MODE_NEAREST);
}

Value Graph::pad(Value x, int right, int bottom) {
    return kernels_ ? ggml_pad(ctx_, x, 0, right, bottom, 0) : ggml_pad(ctx_, x, right, bottom, 0, 0);
}

Value Graph::tokens(Value x) {
    const Shape ne = shape(x);
    if (kernels_) {
        return ggml_reshape_3d(ctx_, kernels_->contiguous(x), ne[0], ne[1] * ne[2], ne[3]);
    }
    Value rows = ggml_reshape_3d(ctx_, x, ne[0] * ne[1], ne[2], ne[3]);
    return ggml_cont(ctx_, ggml_permute(ctx_, rows, 1, 0, 2, 3));
}

Value Graph::image(Value x, int64_t width, int64_t height) {
    if (kernels_) {
        return ggml_reshape_4d(ctx_, kernels_->contiguous(x), x->ne[0], width, height, x->ne[2]);
    }
    Value rows = ggml_cont(ctx_, ggml_permute(ctx_, x, 1, 0, 2, 3)); // [T, C, N]
    return ggml_reshape_4d(ctx_, rows, width, height, rows->ne[1], rows->ne[2]);
}

Value Graph::timestep_embedding(Value timesteps, int64_t width) {
    return ggml_timestep_embedding(ctx_, timesteps, static_cast<int>(width), 10000);
}

} // namespace sd
