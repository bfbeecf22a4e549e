#include "models/siglip.h"

#include "core/error.h"

#include <cmath>

namespace sd {

SiglipConfig SiglipConfig::read(const Scope & vision) {
    const auto find = [&](const char * name) {
        const Scope at = vision.at(name);
        const StoredTensor * stored = at.find();
        if (!stored) {
            fail(Status::bad_file, "SigLIP's image tower is incomplete: %s is missing", at.name().c_str());
        }
        return stored;
    };
    const StoredTensor * squares = find("embeddings.patch_embedding");
    const StoredTensor * positions = find("embeddings.position_embedding");

    SiglipConfig c{};
    c.width = squares->ne[3];
    c.square = squares->ne[0];
    c.hidden = find("encoder.layers.0.mlp.fc1")->ne[1];
    c.positions = positions->ne[1];
    c.head_size = c.width % 72 == 0 ? 72 : 64;
    while (vision.at("encoder.layers." + std::to_string(c.layers) + ".layer_norm1").has()) {
        ++c.layers;
    }
    const auto rows = std::llround(std::sqrt(static_cast<double>(c.positions)));
    if (c.width % c.head_size != 0 || rows * rows != c.positions || c.square < 1 || c.side() > 4096) {
        fail(Status::unsupported,
             "%s: %lld features and %lld positions of %lld pixels are no image tower of SigLIP, whose heads are 64 or "
             "72 wide and whose pictures are squares",
             squares->name.c_str(), static_cast<long long>(c.width), static_cast<long long>(c.positions),
             static_cast<long long>(c.square));
    }
    return c;
}

int64_t SiglipConfig::side() const { return square * std::llround(std::sqrt(static_cast<double>(positions))); }

Value SiglipLayer::operator()(Graph & g, Value x) const {
    Value h = norm1(g, x);
    x = g.add(x, out(g, g.attention(q(g, h), k(g, h), v(g, h), c.width / c.head_size)));
    return g.add(x, fc2(g, g.gelu_tanh(fc1(g, norm2(g, x)))));
}

Siglip::Siglip(const Scope & here) : c(SiglipConfig::read(here.at("vision_model"))), here_(here.at("vision_model")) {
    for (int64_t i = 0; i < c.layers; ++i) {
        layers_.push_back({here_.at("encoder.layers." + std::to_string(i)), c});
    }
}

Value Siglip::operator()(Graph & g, Value image) const {
    Tensor order({c.positions, 1, 1, 1});
    for (size_t i = 0; i < order.data.size(); ++i) {
        order.data[i] = static_cast<float>(i);
    }
    Value x = g.tokens(squares_(g, g.picture(image)));
    x = g.add(x, g.embedding(positions_, g.constant_ids(std::move(order))));
    for (const SiglipLayer & layer : layers_) {
        x = layer(g, x);
    }
    return norm_(g, x);
}

} // namespace sd
