#include "models/t5.h"

#include "core/error.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

namespace sd {

constexpr int64_t max_distance = 128; // of every T5; farther tokens share the last bucket

T5Config T5Config::read(const Scope & t5) {
    const Scope          block = t5.at("encoder.block.0");
    const Scope          attention = block.at("layer.0.SelfAttention"), feed = block.at("layer.1.DenseReluDense");
    const StoredTensor * shared = t5.at("shared").find();
    const StoredTensor * tokens = shared ? shared : t5.at("encoder.embed_tokens").find();
    const StoredTensor * distances = attention.at("relative_attention_bias").find();
    const StoredTensor * q = attention.at("q").find();
    const StoredTensor * gate = feed.at("wi_0").find();
    if (!gate && feed.at("wi").has()) {
        fail(Status::unsupported, "%s: a T5 of the first version; SD3 and FLUX need T5 v1.1, whose feed-forward is gated",
             t5.name().c_str());
    }
    if (!tokens || !distances || !q || !gate) {
        fail(Status::bad_file, "no T5 text encoder was found (%s.shared, .encoder.block.0); give it as t5xxl=",
             t5.name().c_str());
    }
    if (t5.at("encoder.block.1.layer.0.SelfAttention.relative_attention_bias").has()) {
        fail(Status::unsupported, "%s: every block has a relative attention bias, as in UMT5; in T5 v1.1 only the first has",
             t5.name().c_str());
    }
    T5Config c{tokens->ne[0], tokens->ne[1], 0, distances->ne[0], q->ne[1], gate->ne[1], distances->ne[1]};
    if (c.heads < 1 || c.inner % c.heads != 0 || c.buckets < 4 || c.buckets % 4 != 0 || c.buckets / 4 >= max_distance) {
        fail(Status::unsupported, "%s: %lld buckets of distances and %lld heads do not fit an attention %lld wide",
             t5.name().c_str(), static_cast<long long>(c.buckets), static_cast<long long>(c.heads),
             static_cast<long long>(c.inner));
    }
    while (t5.at("encoder.block." + std::to_string(c.layers)).at("layer.0.layer_norm").has()) {
        ++c.layers;
    }
    return c;
}

// Buckets for [Tk, Tq]: half of them for keys before the query and half for keys behind it, of each half one per
// distance for the nearest, the others in logarithmic steps.
static Tensor buckets_of_distances(int64_t n, int64_t buckets) {
    const int64_t half = buckets / 2, exact = half / 2;
    const auto    bucket = [&](int64_t distance) {
        if (distance < exact) {
            return distance;
        }
        // Float as in the reference, for a step that falls on a whole number is decided by its last bit.
        const float step = std::log(static_cast<float>(distance) / static_cast<float>(exact)) /
                           static_cast<float>(std::log(static_cast<double>(max_distance) / static_cast<double>(exact))) *
                           static_cast<float>(half - exact);
        return std::min(exact + static_cast<int64_t>(step), half - 1);
    };
    Tensor out({n, n, 1, 1});
    for (int64_t query = 0; query < n; ++query) {
        for (int64_t key = 0; key < n; ++key) {
            const int64_t at = (key > query ? half : 0) + bucket(std::abs(key - query));
            out.data[query * n + key] = static_cast<float>(at);
        }
    }
    return out;
}

Value T5Block::operator()(Graph & g, Value x, Value bias) const {
    Value h = norm1(g, x);
    h = g.attention_scaled(q(g, h), k(g, h), v(g, h), c.heads, 1.0f, bias);
    x = g.add(x, o(g, h));
    h = norm2(g, x);
    h = g.mul(g.gelu_tanh(gate(g, h)), up(g, h));
    return g.add(x, g.linear_of_large(down.weight, h)); // T5-XXL reaches some hundred thousands here
}

static Scope tokens_of(const Scope & t5) {
    const Scope shared = t5.at("shared"), own = t5.at("encoder.embed_tokens");
    return shared.has() || !own.has() ? shared : own;
}

T5Encoder::T5Encoder(const Scope & t5, const T5Config & config)
    : c(config), here_(t5), tokens_{tokens_of(t5), c.width, c.vocabulary} {
    for (int64_t i = 0; i < c.layers; ++i) {
        blocks_.push_back({here_.at("encoder.block." + std::to_string(i)), c});
    }
}

Value T5Encoder::operator()(Graph & g, Value ids, Value mask) const {
    Value distances = distances_(g, g.constant_ids(buckets_of_distances(Graph::shape(ids)[0], c.buckets)));
    Value bias = g.mask_by_head(distances, mask);
    Value x = tokens_(g, ids);
    for (const T5Block & block : blocks_) {
        x = block(g, x, bias);
    }
    return norm_(g, x);
}

} // namespace sd
