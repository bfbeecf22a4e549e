// The one place where adapters act: what they add to the products of a graph, without touching a weight.
#include "core/error.h"
#include "nn/adapters.h"
#include "nn/graph.h"
#include "nn/kernel_nodes.h"
#include "nn/weights.h"

#include <ggml.h>

namespace sd {

const Adapter * Graph::adapter(const Weight * weight) const {
    return adapters_ ? adapters_->find(weight) : nullptr;
}

// ---- strengths, [entries, images], or [entries, 1] where all images have the same -----------------------

Value Graph::strengths() {
    if (!strengths_) {
        strengths_ = input("strengths");
        if (strengths_->ne[0] != adapters_->entries) {
            fail(Status::internal, "%lld strengths were given for adapters of %lld",
                 static_cast<long long>(strengths_->ne[0]), static_cast<long long>(adapters_->entries));
        }
    }
    return strengths_;
}

// Of n entries, [n, images].
Value Graph::entry_strengths(int64_t first, int64_t n) {
    Value s = strengths();
    return ggml_view_2d(ctx_, s, n, s->ne[1], s->nb[1], static_cast<size_t>(first) * s->nb[0]);
}

// As factors of x [n, T, images]; timesteps have no tokens, [n, images].
Value Graph::token_strengths(int64_t first, int64_t n, Value x) {
    Value s = strengths();
    const int64_t images = s->ne[1];
    const size_t offset = static_cast<size_t>(first) * s->nb[0];
    if (images > 1 && x->ne[2] == 1 && x->ne[1] == images) {
        return entry_strengths(first, n);
    }
    if (images > 1 && x->ne[2] != images) {
        fail(Status::internal, "strengths of %lld images were given for %lld", static_cast<long long>(images),
             static_cast<long long>(x->ne[2]));
    }
    return ggml_view_3d(ctx_, s, n, 1, images, s->nb[1], s->nb[1], offset);
}

// As factors of pictures of n channels.
Value Graph::channel_strengths(int64_t first, int64_t n) {
    Value s = strengths();
    if (kernels_) {
        return ggml_view_4d(ctx_, s, n, 1, 1, s->ne[1], s->nb[1], s->nb[1], s->nb[1],
                            static_cast<size_t>(first) * s->nb[0]);
    }
    return ggml_view_4d(ctx_, s, 1, 1, n, s->ne[1], s->nb[0], s->nb[0], s->nb[1],
                        static_cast<size_t>(first) * s->nb[0]);
}

// Columns of `vectors` [E, n], each by its strength: [n, images].
Value Graph::weighted_sum(Value vectors, int64_t first) {
    Value s = strengths();
    return ggml_mul_mat(
        ctx_, vectors,
        ggml_view_2d(ctx_, s, vectors->ne[0], s->ne[1], s->nb[1], static_cast<size_t>(first) * s->nb[0]));
}

// ---- vectors -------------------------------------------------------------------------------------------

Value Graph::vector(const Weight * weight) {
    const Adapter * adapted = adapter(weight);
    if (!adapted) {
        return resident(weight);
    }
    return ggml_add(ctx_, weighted_sum(adapted->shift.values, adapted->shift.strengths), resident(weight));
}

Value Graph::over_tokens(Value vector, Value x) {
    const bool tokens = x->ne[2] == vector->ne[1];
    return vector->ne[1] > 1 && tokens ? ggml_reshape_3d(ctx_, vector, vector->ne[0], 1, vector->ne[1])
                                       : vector;
}

Value Graph::over_channels(Value vector) {
    if (kernels_) {
        return ggml_reshape_4d(ctx_, vector, vector->ne[0], 1, 1, vector->ne[1]);
    }
    return ggml_reshape_4d(ctx_, vector, 1, 1, vector->ne[0], vector->ne[1]);
}

// ---- products ------------------------------------------------------------------------------------------

bool Graph::low_rank_at_most(const Adapter * adapter) const {
    return !adapter || (adapter->up && !adapter->rows.values && !adapter->columns.values && adapter->kroneckers.empty() &&
                        adapter->dense.empty());
}

// What a weight itself reads of x, where adapters read more behind it: the latent of a picture that control LoRAs follow.
Value Graph::own_inputs(const Adapter * adapted, const Weight * weight, Value x) {
    const int64_t inputs = weight->ne[0], wide = adapted && adapted->down ? adapted->down->ne[0] : inputs;
    if (wide <= inputs || weight->ne[2] * weight->ne[3] > 1) {
        return x;
    }
    if (x->ne[0] != wide) {
        fail(Status::bad_argument, "%lld input features for '%s', where a control LoRA takes %lld: it needs a control_image",
             static_cast<long long>(x->ne[0]), weight->name.c_str(), static_cast<long long>(wide));
    }
    return ggml_cont(ctx_, part(x, 0, inputs));
}

// A product and all that low-rank adapters add to it, in one node.
Value Graph::fused(const Adapter * adapted, const Weight * weight, const Weight * bias, Value x, int stride, int pad) {
    ProductParts parts;
    parts.terms.push_back({resident(weight), own_inputs(adapted, weight, x), stride, pad});
    if (adapted) {
        ProductParts inner;
        inner.terms.push_back({adapted->down, x, stride, pad});
        inner.scale = kernels_->contiguous(entry_strengths(adapted->strengths, adapted->up->ne[0]));
        parts.terms.push_back({adapted->up, kernels_->product(std::move(inner))});
    }
    if (bias) {
        Value values = vector(bias);
        (values->ne[1] > 1 ? parts.shift : parts.bias) = values;
    }
    return kernels_->product(std::move(parts));
}

// (a x b) x, whose element (i, k) is the sum over j, l of a[j, i] b[l, k] x[(j, l)].
Value Graph::kronecker(Value a, Value b, Value x, Value like) {
    const int64_t i1 = a->ne[0], i2 = b->ne[0], o1 = a->ne[1], o2 = b->ne[1],
                  n = ggml_nelements(x) / x->ne[0];
    const auto turned = [&](Value value, int64_t inner,
                            int64_t outer) { // [inner, outer, n] -> [outer, inner, n]
        return ggml_cont(ctx_, ggml_permute(ctx_, ggml_reshape_3d(ctx_, value, inner, outer, n), 1, 0, 2, 3));
    };
    Value y = multiply(b, ggml_reshape_2d(ctx_, x, i2, i1 * n));           // [O2, I1 n]
    y = multiply(a, ggml_reshape_2d(ctx_, turned(y, o2, i1), i1, o2 * n)); // [O1, O2 n]
    return ggml_reshape(ctx_, turned(y, o1, o2), like);
}

Value Graph::adapted_linear(const Adapter & adapter, const Weight * weight, Value x) {
    x = ggml_is_contiguous(x) ? x : ggml_cont(ctx_, x);
    const Value whole = x;
    x = own_inputs(&adapter, weight, x);
    const auto factor = [&](const Adapter::Vectors & vectors, Value of) { // 1 + sum
        return over_tokens(ggml_scale_bias(ctx_, weighted_sum(vectors.values, vectors.strengths), 1.0f, 1.0f),
                           of);
    };
    Value y = multiply(resident(weight), x);
    if (adapter.rows.values && adapter.columns.values) {
        Value scaled = multiply(resident(weight), ggml_mul(ctx_, x, factor(adapter.columns, x)));
        Value sum = weighted_sum(adapter.rows.values, adapter.rows.strengths);
        y = ggml_add(ctx_, scaled, ggml_mul(ctx_, y, over_tokens(sum, y)));
    } else if (adapter.rows.values) {
        y = ggml_mul(ctx_, y, factor(adapter.rows, y));
    } else if (adapter.columns.values) {
        y = multiply(resident(weight), ggml_mul(ctx_, x, factor(adapter.columns, x)));
    }
    if (adapter.up) {
        Value inner = multiply(adapter.down, whole); // [R, T, N]
        inner = ggml_mul(ctx_, inner, token_strengths(adapter.strengths, inner->ne[0], inner));
        y = ggml_add(ctx_, y, multiply(adapter.up, inner));
    }
    const auto add = [&](Value delta, int64_t strength) {
        Value s =
            token_strengths(strength, 1, delta); // repeated, since ggml multiplies whole rows the fastest
        s = ggml_repeat_4d(ctx_, s, delta->ne[0], s->ne[1], s->ne[2], 1);
        y = ggml_add(ctx_, y, ggml_mul(ctx_, delta, s));
    };
    for (const Adapter::Kronecker & k : adapter.kroneckers) {
        add(kronecker(k.a, k.b, x, y), k.strength);
    }
    for (const Adapter::Dense & dense : adapter.dense) {
        add(multiply(dense.delta, x), dense.strength);
    }
    return y;
}

Value Graph::adapted_conv2d(const Adapter & adapter, const Weight * kernel, Value x, int stride, int pad) {
    const auto factor = [&](const Adapter::Vectors & vectors) { // 1 + sum
        return over_channels(
            ggml_scale_bias(ctx_, weighted_sum(vectors.values, vectors.strengths), 1.0f, 1.0f));
    };
    const auto base = [&](Value input) { return multiply(resident(kernel), input, stride, pad); };
    Value y = nullptr;
    if (adapter.rows.values && adapter.columns.values) {
        Value sum = over_channels(weighted_sum(adapter.rows.values, adapter.rows.strengths));
        y = ggml_add(ctx_, base(ggml_mul(ctx_, x, factor(adapter.columns))), ggml_mul(ctx_, base(x), sum));
    } else if (adapter.rows.values) {
        y = ggml_mul(ctx_, base(x), factor(adapter.rows));
    } else {
        y = base(adapter.columns.values ? ggml_mul(ctx_, x, factor(adapter.columns)) : x);
    }
    if (adapter.up) {
        const int64_t rank = adapter.up->ne[0];
        Value         inner = multiply(adapter.down, x, stride, pad);
        inner = ggml_mul(ctx_, inner, channel_strengths(adapter.strengths, rank));
        y = ggml_add(ctx_, y, multiply(ggml_reshape_4d(ctx_, adapter.up, 1, 1, rank, adapter.up->ne[1]), inner, 1, 0));
    }
    for (const Adapter::Dense & dense : adapter.dense) {
        Value delta = multiply(dense.delta, x, stride, pad);
        y = ggml_add(ctx_, y, ggml_mul(ctx_, delta, channel_strengths(dense.strength, 1)));
    }
    return y;
}

Value Graph::adapted_rows(const Adapter & adapter, const Weight * table, Value ids, const Shape & ne) {
    const auto rows = [&](Value from) {
        return ggml_reshape_4d(ctx_, ggml_get_rows(ctx_, from, ids), from->ne[0], ne[0], ne[1], ne[2]);
    };
    Value y = rows(resident(table));
    if (adapter.up) {
        Value inner = rows(adapter.up); // [R, n, N]
        inner = ggml_mul(ctx_, inner, token_strengths(adapter.strengths, inner->ne[0], inner));
        y = ggml_add(ctx_, y, ggml_mul_mat(ctx_, adapter.down, inner));
    }
    for (const Adapter::Dense & dense : adapter.dense) {
        Value delta = rows(dense.delta);
        y = ggml_add(ctx_, y, ggml_mul(ctx_, delta, token_strengths(dense.strength, 1, delta)));
    }
    return y;
}

} // namespace sd
