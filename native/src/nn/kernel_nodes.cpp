#include "nn/kernel_nodes.h"

#include "kernels/attention.h"

#include <ggml.h>

namespace sd {

ggml_tensor * KernelNodes::contiguous(ggml_tensor * x) { return ggml_is_contiguous(x) ? x : ggml_cont(ctx_, x); }

ggml_tensor * KernelNodes::product(ProductParts parts) {
    for (ProductTerm & term : parts.terms) {
        if (const Resize * enlarged = made_by<Resize>(term.x)) {
            term.seen_width = enlarged->width();
            term.seen_height = enlarged->height();
            term.x = enlarged->x();
        }
        term.x = narrow(contiguous(term.x));
    }
    return keep(std::make_unique<Product>(set_, pool_, std::move(parts)));
}

ggml_tensor * KernelNodes::narrow(ggml_tensor * x) {
    if (!set_.bf16 || x->type != GGML_TYPE_F32 || x->ne[0] % 2 != 0) {
        return x;
    }
    if (const auto known = narrow_.find(x); known != narrow_.end()) {
        return known->second;
    }
    ggml_tensor * twin = x;
    if (const Operation * made = operation(x)) {
        if (std::unique_ptr<Operation> operation = made->narrowed()) {
            twin = keep(std::move(operation));
        }
    } else if (x->op == GGML_OP_RESHAPE) {
        ggml_tensor * inner = narrow(x->src[0]);
        twin = inner == x->src[0] ? x : ggml_reshape_4d(ctx_, inner, x->ne[0], x->ne[1], x->ne[2], x->ne[3]);
    }
    return narrow_[x] = twin;
}

ggml_tensor * KernelNodes::attention(ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, int64_t heads, float scale,
                                     ggml_tensor * mask) {
    return keep(std::make_unique<Attention>(set_, pool_, contiguous(q), contiguous(k), contiguous(v), heads, scale,
                                            mask ? contiguous(mask) : nullptr));
}

ggml_tensor * KernelNodes::group_norm(ggml_tensor * x, ggml_tensor * weight, ggml_tensor * bias, int groups, float eps) {
    return keep(std::make_unique<GroupNormOperation>(set_, pool_, contiguous(x), weight, bias, groups, eps, Activation::none));
}

ggml_tensor * KernelNodes::row_norm(ggml_tensor * x, ggml_tensor * weight, ggml_tensor * bias, float eps, bool rms) {
    return keep(std::make_unique<RowNorm>(set_, pool_, contiguous(x), weight, bias, eps, rms));
}

ggml_tensor * KernelNodes::activate(ggml_tensor * x, Activation activation) {
    if (const Product * made = made_by<Product>(x)) {
        ProductParts parts = made->parts();
        if (parts.activation == Activation::none && !parts.scale && !parts.shift && !parts.residual) {
            parts.activation = activation;
            return product(std::move(parts));
        }
    }
    if (const auto * made = made_by<GroupNormOperation>(x); made && made->activation() == Activation::none) {
        return keep(made->with(activation));
    }
    return keep(std::make_unique<Activate>(set_, pool_, contiguous(x), activation));
}

ggml_tensor * KernelNodes::geglu(ggml_tensor * x) {
    const Product * made = made_by<Product>(x);
    if (!made || !Product::can_gate(made->parts())) {
        return nullptr;
    }
    ProductParts parts = made->parts();
    parts.activation = Activation::geglu;
    return product(std::move(parts));
}

ggml_tensor * KernelNodes::add(ggml_tensor * x, ggml_tensor * y) {
    if (!ggml_are_same_shape(x, y)) {
        return ggml_add(ctx_, x, y);
    }
    // The later of the two is what was made to be added; the earlier one has other readers and would be computed twice.
    const auto number = [&](ggml_tensor * of) {
        const auto at = numbers_.find(of);
        return at == numbers_.end() ? size_t{0} : at->second;
    };
    ggml_tensor * later = number(x) > number(y) ? x : y;
    const Product * made = made_by<Product>(later);
    if (made && !made->parts().residual && made->parts().activation != Activation::geglu) {
        ProductParts parts = made->parts();
        parts.residual = contiguous(later == x ? y : x);
        return product(std::move(parts));
    }
    return keep(std::make_unique<Add>(set_, pool_, contiguous(x), contiguous(y)));
}

ggml_tensor * KernelNodes::add_per_image(ggml_tensor * x, ggml_tensor * y) {
    const Product * made = made_by<Product>(x);
    if (made && !made->parts().shift && !made->parts().residual && made->parts().activation != Activation::geglu) {
        ProductParts parts = made->parts();
        parts.shift = contiguous(y);
        return product(std::move(parts));
    }
    return ggml_add(ctx_, x, ggml_reshape_4d(ctx_, y, y->ne[0], 1, 1, y->ne[1]));
}

ggml_tensor * KernelNodes::concat_channels(ggml_tensor * x, ggml_tensor * y) {
    return keep(std::make_unique<ConcatChannels>(set_, pool_, contiguous(x), contiguous(y)));
}

ggml_tensor * KernelNodes::resize(ggml_tensor * x, int64_t width, int64_t height) {
    return keep(std::make_unique<Resize>(set_, pool_, contiguous(x), width, height));
}

} // namespace sd
