#include "models/clip.h"

#include "core/error.h"

#include <limits>

namespace sd {

constexpr int64_t head_size = 64;

ClipConfig ClipConfig::read(const Scope & text_model, bool quick) {
    const StoredTensor * tokens = text_model.at("embeddings.token_embedding").find();
    const StoredTensor * positions = text_model.at("embeddings.position_embedding").find();
    const StoredTensor * fc1 = text_model.at("encoder.layers.0.mlp.fc1").find();
    if (!tokens || !positions || !fc1) {
        fail(Status::bad_file,
             "no CLIP text encoder was found (%s.embeddings, .encoder.layers.0); give it as clip_l=",
             text_model.name().c_str());
    }
    ClipConfig c{tokens->ne[0], tokens->ne[1], positions->ne[1], 0, fc1->ne[1], quick};
    if (c.width % head_size != 0) {
        fail(Status::unsupported, "%s is %lld wide; CLIP's heads need a multiple of %lld", tokens->name.c_str(),
             static_cast<long long>(c.width), static_cast<long long>(head_size));
    }
    while (text_model.at("encoder.layers." + std::to_string(c.layers)).at("layer_norm1").has()) {
        ++c.layers;
    }
    return c;
}

Value ClipLayer::operator()(Graph & g, Value x, Value mask) const {
    Value h = norm1(g, x);
    h = g.attention(q(g, h), k(g, h), v(g, h), c.width / head_size, mask);
    x = g.add(x, out(g, h));
    h = fc1(g, norm2(g, x));
    return g.add(x, fc2(g, c.quick ? g.quick_gelu(h) : g.gelu(h)));
}

ClipText::ClipText(const Scope & text_model, const ClipConfig & config) : c(config), here_(text_model) {
    for (int64_t i = 0; i < c.layers; ++i) {
        layers_.push_back({here_.at("encoder.layers." + std::to_string(i)), c});
    }
}

Value ClipText::operator()(Graph & g, Value ids, int skip) const {
    const int64_t n = Graph::shape(ids)[0];

    Tensor mask({n, n, 1, 1}); // a token sees itself and those before it
    Tensor order({n, 1, 1, 1});
    for (int64_t row = 0; row < n; ++row) {
        order.data[row] = static_cast<float>(row);
        for (int64_t column = row + 1; column < n; ++column) {
            mask.data[row * n + column] = -std::numeric_limits<float>::infinity();
        }
    }
    Value causal = g.constant(std::move(mask));
    Value x = g.add(tokens_(g, ids), positions_(g, g.constant_ids(std::move(order))));
    for (int64_t i = 0; i + skip <= c.layers; ++i) {
        x = layers_[i](g, x, causal);
    }
    return norm_(g, x);
}

} // namespace sd
