#include "models/clip.h"

#include "core/error.h"

#include <limits>

namespace sd {

constexpr int64_t head_size = 64;

// The names are of parameters: OpenCLIP has this one without a module.
static Scope position_embedding(const ClipConfig & c, const Scope & here) {
    return c.at(here, "positional_embedding", "text_model.embeddings.position_embedding.weight");
}

static Scope layer(const ClipConfig & c, const Scope & here, int64_t i) {
    const std::string number = std::to_string(i);
    return c.at(here, "transformer.resblocks." + number, "text_model.encoder.layers." + number);
}

ClipConfig ClipConfig::read(const Scope & here, bool quick, bool open, const char * argument) {
    ClipConfig           c{0, 0, 0, 0, 0, quick, open};
    const Scope          first = layer(c, here, 0);
    const StoredTensor * tokens = c.at(here, "token_embedding", "text_model.embeddings.token_embedding").find();
    const StoredTensor * positions = position_embedding(c, here).find("");
    const StoredTensor * fc1 = c.at(first, "mlp.c_fc", "mlp.fc1").find();
    if (!tokens || !positions || !fc1) {
        fail(Status::bad_file, "no text encoder was found at %s (nor at %s); give it as %s=", here.name().c_str(),
             here.diffusers().c_str(), argument);
    }
    c.width = tokens->ne[0];
    c.vocabulary = tokens->ne[1];
    c.positions = positions->ne[1];
    c.hidden = fc1->ne[1];
    if (c.width % head_size != 0) {
        fail(Status::unsupported, "%s is %lld wide; CLIP's heads need a multiple of %lld", tokens->name.c_str(),
             static_cast<long long>(c.width), static_cast<long long>(head_size));
    }
    while (c.at(layer(c, here, c.layers), "ln_1", "layer_norm1").has()) {
        ++c.layers;
    }
    return c;
}

std::optional<ClipLayer::Projections> ClipLayer::declare_qkv() const {
    if (!c.open) {
        return std::nullopt;
    }
    const auto parts = [&](const std::string & leaf) {
        return std::vector<WeightPart>{{"q_proj." + leaf, 0, c.width},
                                       {"k_proj." + leaf, c.width, c.width},
                                       {"v_proj." + leaf, 2 * c.width, c.width}};
    };
    const Scope attention = here.at("attn", "self_attn");
    return Projections{attention.fused("in_proj_weight", {c.width, 3 * c.width, 1, 1}, parts("weight")),
                       attention.fused("in_proj_bias", {3 * c.width, 1, 1, 1}, parts("bias"))};
}

std::optional<Linear> ClipLayer::declare_single(const char * name) const {
    return c.open ? std::nullopt : std::optional<Linear>({here.at(name), c.width, c.width});
}

Value ClipLayer::operator()(Graph & g, Value x, Value mask) const {
    Value       h = norm1(g, x);
    const Value joined = qkv ? g.linear(qkv->weight, qkv->bias, h) : nullptr;
    const auto  projected = [&](const std::optional<Linear> & single, int64_t i) {
        return joined ? g.part(joined, i * c.width, c.width) : (*single)(g, h);
    };
    h = g.attention(projected(q, 0), projected(k, 1), projected(v, 2), c.width / head_size, mask);
    x = g.add(x, out(g, h));
    h = fc1(g, norm2(g, x));
    return g.add(x, fc2(g, c.quick ? g.quick_gelu(h) : g.gelu(h)));
}

ClipText::ClipText(const Scope & here, const ClipConfig & config)
    : c(config), here_(here), positions_(position_embedding(c, here).table("", c.width, c.positions)) {
    for (int64_t i = 0; i < c.layers; ++i) {
        layers_.push_back({layer(c, here_, i), c});
    }
}

Value ClipText::run(Graph & g, Value x, int64_t first, int64_t end) const {
    const int64_t n = Graph::shape(x)[1];
    Tensor        mask({n, n, 1, 1}); // a token sees itself and those before it
    for (int64_t row = 0; row < n; ++row) {
        for (int64_t column = row + 1; column < n; ++column) {
            mask.data[row * n + column] = -std::numeric_limits<float>::infinity();
        }
    }
    Value causal = g.constant(std::move(mask));
    for (int64_t i = first; i < end; ++i) {
        x = layers_[i](g, x, causal);
    }
    return x;
}

Value ClipText::operator()(Graph & g, Value ids, int skip, const std::string & suffix) const {
    Tensor order({Graph::shape(ids)[0], 1, 1, 1});
    for (size_t i = 0; i < order.data.size(); ++i) {
        order.data[i] = static_cast<float>(i);
    }
    Value x = tokens_(g, ids);
    if (g.has_input("learned" + suffix)) {
        x = g.replace_tokens(x, g.input("keep" + suffix), g.input("learned" + suffix));
    }
    x = g.add(x, g.embedding(positions_, g.constant_ids(std::move(order))));
    return run(g, x, 0, c.layers - skip + 1);
}

Value ClipText::finish(Graph & g, Value states, int skip) const {
    return skip > 1 ? run(g, states, c.layers - skip + 1, c.layers) : states;
}

Value ClipText::pooled(Graph & g, Value states, Value ends) const { return g.gather(norm_(g, states), ends); }

} // namespace sd
