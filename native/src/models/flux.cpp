#include "models/flux.h"

#include "core/error.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <numeric>

namespace sd {

constexpr int64_t time_features = 256;
constexpr float eps = 1e-6f;

// ---- configuration -------------------------------------------------------------------------------------

// Blocks are numbered from 0; each has this layer.
static int64_t count_blocks(const Scope & flux, const char * single, const char * diffusers,
                            const char * layer, const char * diffusers_layer) {
    int64_t n = 0;
    const auto block = [&] { return flux.at(single + std::to_string(n), diffusers + std::to_string(n)); };
    while (block().at(layer, diffusers_layer).has()) {
        ++n;
    }
    return n;
}

// "16,56,56", as config.json has it; of nothing, FLUX's own shares of a head.
static std::vector<int64_t> read_axes(const std::string & stated, int64_t head_size) {
    if (stated.empty()) {
        const int64_t first = head_size / 8 / 2 * 2, rest = (head_size - first) / 2;
        return {first, rest, rest};
    }
    std::vector<int64_t> axes;
    for (const char * at = stated.c_str(); *at != 0;) {
        char * end = nullptr;
        axes.push_back(std::strtol(at, &end, 10));
        at = *end == ',' ? end + 1 : end == at ? at + 1 : end;
    }
    return axes;
}

FluxConfig FluxConfig::read(const Scope & flux, const std::string & axes) {
    const auto find = [&](const char * single, const char * diffusers, const char * leaf = "weight") {
        const Scope at = flux.at(single, diffusers);
        const StoredTensor * stored = at.find(leaf);
        if (!stored) {
            fail(Status::bad_file,
                 "the transformer of FLUX is incomplete: %s or its diffusers name is missing",
                 at.name().c_str());
        }
        return stored;
    };
    const StoredTensor * image_in = find("img_in", "x_embedder");
    const StoredTensor * norm =
        find("double_blocks.0.img_attn.norm.query_norm.scale", "transformer_blocks.0.attn.norm_q.weight", "");

    FluxConfig c{};
    c.hidden = image_in->ne[1];
    c.head_size = norm->ne[0];
    c.mlp = find("double_blocks.0.img_mlp.0", "transformer_blocks.0.ff.net.0.proj")->ne[1];
    c.inputs = image_in->ne[0];
    c.outputs = find("final_layer.linear", "proj_out")->ne[1];
    c.context = find("txt_in", "context_embedder")->ne[0];
    c.pooled = find("vector_in.in_layer", "time_text_embed.text_embedder.linear_1")->ne[0];
    c.guidance = flux.at("guidance_in.in_layer", "time_text_embed.guidance_embedder.linear_1").has();
    c.double_blocks =
        count_blocks(flux, "double_blocks.", "transformer_blocks.", "img_attn.proj", "attn.to_out.0");
    c.single_blocks =
        count_blocks(flux, "single_blocks.", "single_transformer_blocks.", "linear2", "proj_out");
    c.axes = read_axes(axes, c.head_size);

    const bool even =
        std::all_of(c.axes.begin(), c.axes.end(), [](int64_t n) { return n > 0 && n % 2 == 0; });
    if (c.head_size < 2 || c.hidden % c.head_size != 0 || c.axes.size() != 3 || !even ||
        std::accumulate(c.axes.begin(), c.axes.end(), int64_t{0}) != c.head_size) {
        fail(Status::unsupported,
             "%s: %lld features do not divide into heads of %lld, turned along three axes",
             image_in->name.c_str(), static_cast<long long>(c.hidden), static_cast<long long>(c.head_size));
    }
    if (c.inputs % 4 != 0 || c.outputs % 4 != 0) {
        fail(Status::unsupported, "%s: %lld inputs and %lld outputs are no squares of 2 x 2 cells",
             image_in->name.c_str(), static_cast<long long>(c.inputs), static_cast<long long>(c.outputs));
    }
    return c;
}

// ---- blocks --------------------------------------------------------------------------------------------

Value Rotation::operator()(Graph & g, Value x) const {
    for (size_t axis = 0; axis < positions.size(); ++axis) {
        x = g.rope(x, positions[axis], periods[axis]);
    }
    return x;
}

namespace {

// Queries, keys and values, each [head size, heads, T, N].
struct Heads {
    Value q, k, v;
};

// Out of tokens whose first 3 * hidden features are q, k and v.
Heads split_heads(Graph & g, const FluxConfig & c, Value qkv, const RmsNorm & query_norm,
                  const RmsNorm & key_norm) {
    const auto part = [&](int64_t i) { return g.by_heads(g.part(qkv, i * c.hidden, c.hidden), c.heads()); };
    return {query_norm(g, part(0)), key_norm(g, part(1)), part(2)};
}

Value attend(Graph & g, const FluxConfig & c, const Heads & h, const Rotation & turn) {
    return g.attention(g.side_by_side(turn(g, h.q)), g.side_by_side(turn(g, h.k)), g.side_by_side(h.v),
                       c.heads());
}

} // namespace

void FluxDoubleBlock::operator()(Graph & g, Value & image_tokens, Value & text_tokens, Value vec,
                                 const Rotation & turn) const {
    struct Side {
        const FluxStream & stream;
        Value & tokens;
        Value modulation;
        Value chunk(Graph & g, int64_t i) const { return g.chunk(modulation, i, stream.c.hidden); }
    };
    Side sides[] = {{text, text_tokens, text.modulation(g, vec)},
                    {image, image_tokens, image.modulation(g, vec)}};

    Heads heads[2];
    for (int i = 0; i < 2; ++i) {
        const FluxStream & s = sides[i].stream;
        Value x = g.modulate(g.normalise(sides[i].tokens, eps), sides[i].chunk(g, 0), sides[i].chunk(g, 1));
        heads[i] = split_heads(g, c, s.qkv(g, x), s.query_norm, s.key_norm);
    }
    const Heads joint{g.concat(heads[0].q, heads[1].q, 2), g.concat(heads[0].k, heads[1].k, 2),
                      g.concat(heads[0].v, heads[1].v, 2)};
    Value attention = attend(g, c, joint, turn);

    int64_t first = 0;
    for (const Side & side : sides) {
        const FluxStream & s = side.stream;
        const int64_t n = Graph::shape(side.tokens)[1];
        Value x = g.add_gated(side.tokens, s.proj(g, g.token_range(attention, first, n)), side.chunk(g, 2));
        Value h = g.modulate(g.normalise(x, eps), side.chunk(g, 3), side.chunk(g, 4));
        side.tokens = g.add_gated(x, s.mlp2(g, g.gelu_tanh(s.mlp1(g, h))), side.chunk(g, 5));
        first += n;
    }
}

Value FluxSingleBlock::operator()(Graph & g, Value x, Value vec, const Rotation & turn) const {
    Value m = modulation(g, vec);
    Value h = g.modulate(g.normalise(x, eps), g.chunk(m, 0, c.hidden), g.chunk(m, 1, c.hidden));
    h = linear1(g, h);
    Value attention = attend(g, c, split_heads(g, c, h, query_norm, key_norm), turn);
    Value mlp = g.gelu_tanh(g.part(h, 3 * c.hidden, c.mlp));
    return g.add_gated(x, linear2(g, g.concat(attention, mlp, 0)), g.chunk(m, 2, c.hidden));
}

// ---- the whole -----------------------------------------------------------------------------------------

Flux::Flux(const Scope & here, const std::string & axes)
    : c(FluxConfig::read(here, axes)), here_(here),
      time_in_{here.at("time_in", "time_text_embed.timestep_embedder"), "in_layer", "out_layer",
               time_features, c.hidden},
      pooled_in_{here.at("vector_in", "time_text_embed.text_embedder"), "in_layer", "out_layer", c.pooled,
                 c.hidden} {
    if (c.guidance) {
        guidance_in_ = {here.at("guidance_in", "time_text_embed.guidance_embedder"), "in_layer", "out_layer",
                        time_features, c.hidden};
    }
    for (int64_t i = 0; i < c.double_blocks; ++i) {
        const std::string number = std::to_string(i);
        double_.push_back({here.at("double_blocks." + number, "transformer_blocks." + number), c});
    }
    for (int64_t i = 0; i < c.single_blocks; ++i) {
        const std::string number = std::to_string(i);
        single_.push_back({here.at("single_blocks." + number, "single_transformer_blocks." + number), c});
    }
}

// Text stands at (0, 0, 0), a square of a picture at (index of the picture, row, column). Where all are of the
// first picture, the first axis turns nothing.
Rotation Flux::rotation(Graph & g, int64_t text_tokens, const std::vector<Grid> & grids) const {
    constexpr double base = 10000;
    constexpr float never = 1e30f;

    Rotation out;
    for (size_t axis = grids.size() > 1 ? 0 : 1; axis < c.axes.size(); ++axis) {
        std::vector<float> at(static_cast<size_t>(text_tokens), 0.0f);
        for (const Grid & grid : grids) {
            for (int64_t i = 0; i < grid.rows * grid.columns; ++i) {
                const int64_t position[] = {grid.index, i / grid.columns, i % grid.columns};
                at.push_back(static_cast<float>(position[axis]));
            }
        }
        Tensor positions({static_cast<int64_t>(at.size()), 1, 1, 1}), periods({c.head_size / 2, 1, 1, 1});
        positions.data = std::move(at);
        std::fill(periods.data.begin(), periods.data.end(), never);
        const int64_t size = c.axes[axis];
        const int64_t first = std::accumulate(c.axes.begin(), c.axes.begin() + static_cast<int64_t>(axis), int64_t{0});
        for (int64_t i = 0; i < size / 2; ++i) {
            const double period = std::pow(base, 2.0 * static_cast<double>(i) / static_cast<double>(size));
            periods.data[first / 2 + i] = static_cast<float>(period);
        }
        out.positions.push_back(g.constant_ids(std::move(positions)));
        out.periods.push_back(g.constant(std::move(periods)));
    }
    return out;
}

Value Flux::operator()(Graph & g, Value latent, Value timesteps, Value text, Value pooled, Value guidance,
                       Value reference) const {
    const Shape ne = Graph::shape(latent);
    Value vec = time_in_(g, g.timestep_embedding(timesteps, time_features));
    if (guidance_in_) {
        vec =
            g.add(vec, (*guidance_in_)(g, g.timestep_embedding(g.scaled(guidance, 1000.0f), time_features)));
    }
    vec = g.silu(g.add(vec, pooled_in_(g, pooled)));

    Value squares = g.patches(latent);
    Value text_tokens = text_in_(g, text);
    const int64_t n_text = Graph::shape(text_tokens)[1], n_image = Graph::shape(squares)[1];
    std::vector<Grid> grids{{0, ne[0] / 2, ne[1] / 2}};
    if (reference) {
        const Shape size = Graph::shape(reference);
        squares = g.concat(squares, g.patches(reference), 1);
        grids.push_back({1, size[0] / 2, size[1] / 2});
    }
    const Rotation turn = rotation(g, n_text, grids);
    Value image_tokens = image_in_(g, squares);
    for (const FluxDoubleBlock & block : double_) {
        block(g, image_tokens, text_tokens, vec, turn);
    }
    Value x = g.concat(text_tokens, image_tokens, 1);
    for (const FluxSingleBlock & block : single_) {
        x = block(g, x, vec, turn);
    }
    x = g.token_range(x, n_text, n_image);

    Value m = modulation_out_(g, vec);
    x = g.modulate(g.normalise(x, eps), g.chunk(m, 0, c.hidden), g.chunk(m, 1, c.hidden));
    return g.from_patches(out_(g, x), ne[0], ne[1], true);
}

} // namespace sd
