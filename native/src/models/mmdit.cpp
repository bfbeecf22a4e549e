#include "models/mmdit.h"

#include "core/error.h"

#include <cmath>

namespace sd {

constexpr int64_t time_features = 256;
constexpr float eps = 1e-6f;

MmditConfig MmditConfig::read(const Scope & mmdit) {
    const auto find = [&](const char * single, const char * diffusers, const char * leaf = "weight") {
        const Scope at = mmdit.at(single, diffusers);
        const StoredTensor * stored = at.find(leaf);
        if (!stored) {
            fail(Status::bad_file,
                 "the transformer of Stable Diffusion 3 is incomplete: %s or its diffusers name is missing",
                 at.name().c_str());
        }
        return stored;
    };
    const StoredTensor * image_in = find("x_embedder.proj", "pos_embed.proj");
    const StoredTensor * positions = find("pos_embed", "pos_embed.pos_embed", "");
    const StoredTensor * norm =
        mmdit.at("joint_blocks.0.x_block.attn.ln_q", "transformer_blocks.0.attn.norm_q").find();

    MmditConfig c{};
    c.hidden = image_in->ne[3];
    c.head_size = norm ? norm->ne[0] : 64;
    c.channels = image_in->ne[2];
    c.outputs = find("final_layer.linear", "proj_out")->ne[1];
    c.context = find("context_embedder", "context_embedder")->ne[0];
    c.pooled = find("y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1")->ne[0];
    c.positions = std::llround(std::sqrt(static_cast<double>(positions->ne[1])));
    const auto block = [&] {
        const std::string number = std::to_string(c.blocks);
        return mmdit.at("joint_blocks." + number, "transformer_blocks." + number);
    };
    while (block().at("x_block.attn.proj", "attn.to_out.0").has()) {
        ++c.blocks;
    }
    if (c.head_size < 1 || c.hidden % c.head_size != 0 || c.outputs % 4 != 0 ||
        c.positions * c.positions != positions->ne[1]) {
        fail(Status::unsupported,
             "%s: %lld features in heads of %lld, %lld outputs and %lld positions are no transformer of "
             "Stable Diffusion 3",
             image_in->name.c_str(), static_cast<long long>(c.hidden), static_cast<long long>(c.head_size),
             static_cast<long long>(c.outputs), static_cast<long long>(positions->ne[1]));
    }
    return c;
}

// ---- blocks --------------------------------------------------------------------------------------------

std::optional<HeadNorm> MmditAttention::norm(const char * name, const std::string & diffusers_name) const {
    const Scope at = here.at(name, diffusers_name + ".weight");
    return at.has("") ? std::optional<HeadNorm>({at, c.head_size, eps}) : std::nullopt;
}

std::optional<Linear> MmditAttention::way_out() const {
    if (!has_out) {
        return std::nullopt;
    }
    return Linear{here.at("proj", diffusers[5]), c.hidden, c.hidden};
}

std::vector<Value> MmditAttention::operator()(Graph & g, Value x) const {
    x = qkv(g, x);
    std::vector<Value> out;
    for (int64_t i = 0; i < 3; ++i) {
        const std::optional<HeadNorm> & norm = i == 0 ? query_norm : key_norm;
        Value part = g.by_heads(g.part(x, i * c.hidden, c.hidden), c.heads());
        out.push_back(norm && i < 2 ? (*norm)(g, part) : part);
    }
    return out;
}

MmditAttention MmditStream::attend(const char * name) const {
    static const std::vector<std::string> of_image = {"to_q", "to_k", "to_v", "norm_q", "norm_k", "to_out.0"};
    static const std::vector<std::string> of_text = {"add_q_proj",   "add_k_proj",   "add_v_proj",
                                                     "norm_added_q", "norm_added_k", "to_add_out"};
    return {here.at(name), c, is_text ? of_text : of_image, goes_on};
}

std::optional<MmditAttention> MmditStream::attend_again() const {
    if (!twice) {
        return std::nullopt;
    }
    return attend("attn2");
}

std::optional<Linear> MmditStream::mlp(const char * name, const std::string & diffusers, int64_t in,
                                       int64_t out) const {
    if (!goes_on) {
        return std::nullopt;
    }
    return Linear{here.at(std::string("mlp.") + name, (is_text ? "ff_context." : "ff.") + diffusers), in,
                  out};
}

void MmditBlock::operator()(Graph & g, Value & image_tokens, Value & text_tokens, Value vec) const {
    const auto attend = [&](const std::vector<Value> & qkv) {
        return g.attention(g.side_by_side(qkv[0]), g.side_by_side(qkv[1]), g.side_by_side(qkv[2]), c.heads());
    };
    const auto modulated = [&](Value x, Value m, int64_t first) {
        return g.modulate(g.normalise(x, eps), g.chunk(m, first, c.hidden), g.chunk(m, first + 1, c.hidden));
    };
    Value of_image = image.modulation(g, vec), of_text = text.modulation(g, vec);

    std::vector<Value> joint = image.attention(g, modulated(image_tokens, of_image, 0));
    const std::vector<Value> other = text.attention(g, modulated(text_tokens, of_text, 0));
    for (size_t i = 0; i < joint.size(); ++i) {
        joint[i] = g.concat(joint[i], other[i], 2);
    }
    Value attention = attend(joint);
    const int64_t n_image = Graph::shape(image_tokens)[1], n_text = Graph::shape(text_tokens)[1];

    const auto finish = [&](const MmditStream & s, Value x, Value m, Value attended, Value second) {
        x = g.add_gated(x, (*s.attention.out)(g, attended), g.chunk(m, 2, c.hidden));
        x = second ? g.add_gated(x, second, g.chunk(m, 8, c.hidden)) : x;
        Value h = (*s.mlp2)(g, g.gelu_tanh((*s.mlp1)(g, modulated(x, m, 3))));
        return g.add_gated(x, h, g.chunk(m, 5, c.hidden));
    };
    Value second = nullptr;
    if (image.attention2) {
        second =
            (*image.attention2->out)(g, attend((*image.attention2)(g, modulated(image_tokens, of_image, 6))));
    }
    image_tokens = finish(image, image_tokens, of_image, g.token_range(attention, 0, n_image), second);
    if (!is_last) {
        text_tokens = finish(text, text_tokens, of_text, g.token_range(attention, n_image, n_text), nullptr);
    }
}

// ---- the whole -----------------------------------------------------------------------------------------

Mmdit::Mmdit(const Scope & here)
    : c(MmditConfig::read(here)), here_(here),
      time_in_{here.at("t_embedder", "time_text_embed.timestep_embedder"), time_features, c.hidden},
      pooled_in_{here.at("y_embedder", "time_text_embed.text_embedder"), c.pooled, c.hidden} {
    for (int64_t i = 0; i < c.blocks; ++i) {
        const std::string number = std::to_string(i);
        blocks_.push_back(
            {here.at("joint_blocks." + number, "transformer_blocks." + number), c, i + 1 == c.blocks});
    }
}

// The middle of the largest picture's positions.
Value Mmdit::positions(Graph & g, int64_t columns, int64_t rows) const {
    if (columns > c.positions || rows > c.positions) {
        fail(Status::bad_argument,
             "a picture of %lld x %lld squares of 2 x 2 cells: this model knows positions for %lld x %lld",
             static_cast<long long>(columns), static_cast<long long>(rows),
             static_cast<long long>(c.positions), static_cast<long long>(c.positions));
    }
    const int64_t left = (c.positions - columns) / 2, top = (c.positions - rows) / 2;
    Tensor ids({columns * rows, 1, 1, 1});
    for (int64_t i = 0; i < columns * rows; ++i) {
        ids.data[i] = static_cast<float>((top + i / columns) * c.positions + left + i % columns);
    }
    return g.embedding(positions_, g.constant_ids(std::move(ids)));
}

Value Mmdit::operator()(Graph & g, Value latent, Value timesteps, Value text, Value pooled) const {
    const Shape ne = Graph::shape(latent);
    Value vec =
        g.silu(g.add(time_in_(g, g.timestep_embedding(timesteps, time_features)), pooled_in_(g, pooled)));
    Value text_tokens = text_in_(g, text);
    Value x = g.add(g.tokens(image_in_(g, g.picture(latent))), positions(g, ne[0] / 2, ne[1] / 2));
    for (const MmditBlock & block : blocks_) {
        block(g, x, text_tokens, vec);
    }
    Value m = modulation_out_(g, vec);
    x = g.modulate(g.normalise(x, eps), g.chunk(m, 0, c.hidden), g.chunk(m, 1, c.hidden));
    return g.from_patches(out_(g, x), ne[0], ne[1], false);
}

} // namespace sd
