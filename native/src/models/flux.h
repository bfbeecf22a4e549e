// The transformer of FLUX.1 (Black Forest Labs, 2024; https://github.com/black-forest-labs/flux): blocks in which
// text and picture have weights of their own, then blocks that treat both alike. Names as Black Forest Labs'
// checkpoints, and as diffusers' FluxTransformer2DModel.
#pragma once

#include "nn/layers.h"

#include <optional>
#include <string>
#include <vector>

namespace sd {

struct FluxConfig {
    int64_t hidden, head_size, mlp; // features of a token, of a head, and inside the MLPs
    int64_t inputs, outputs;        // features of a 2 x 2 square of latent cells
    int64_t context, pooled;        // features of the text's tokens, and of its one vector
    int64_t double_blocks, single_blocks;
    bool    guidance;               // whether it was distilled to take the guidance as an input

    std::vector<int64_t> axes; // features of a head that turn with each of the three positions

    int64_t heads() const { return hidden / head_size; }

    // All is legible in the shapes but the axes: "16,56,56" as config.json states them, or "" for these shares of
    // a head.
    static FluxConfig read(const Scope & flux, const std::string & axes);
};

// What a sequence of tokens is turned by: positions [T] per axis, and periods [head size / 2], which leave other
// axes' features as they are.
struct Rotation {
    std::vector<Value> positions, periods;

    Value operator()(Graph & g, Value x) const; // [head size, heads, T, N]
};

// How the two sides of a double block are called.
struct FluxSide {
    const char *single, *norm, *q, *k, *v, *norm_q, *norm_k, *out, *mlp;
};

// The weights of one side.
struct FluxStream {
    Scope      here;
    FluxConfig c;
    FluxSide   side;

    std::string own = side.single;
    Scope       attention = here.at(own + "_attn", "attn");

    Linear      modulation{here.at(own + "_mod.lin", side.norm + std::string(".linear")), c.hidden, 6 * c.hidden};
    FusedLinear qkv{attention.at("qkv", ""), c.hidden, {{side.q, c.hidden}, {side.k, c.hidden}, {side.v, c.hidden}}};
    RmsNorm     query_norm{attention.at("norm.query_norm.scale", side.norm_q + std::string(".weight")), c.head_size, 1e-6f, ""};
    RmsNorm     key_norm{attention.at("norm.key_norm.scale", side.norm_k + std::string(".weight")), c.head_size, 1e-6f, ""};
    Linear      proj{attention.at("proj", side.out), c.hidden, c.hidden};
    Linear      mlp1{here.at(own + "_mlp.0", side.mlp + std::string(".net.0.proj")), c.hidden, c.mlp};
    Linear      mlp2{here.at(own + "_mlp.2", side.mlp + std::string(".net.2")), c.mlp, c.hidden};
};

struct FluxDoubleBlock {
    Scope      here;
    FluxConfig c;

    FluxStream image{here, c, {"img", "norm1", "to_q", "to_k", "to_v", "norm_q", "norm_k", "to_out.0", "ff"}};
    FluxStream text{here, c,
                    {"txt", "norm1_context", "add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k",
                     "to_add_out", "ff_context"}};

    // Both sequences [hidden, T, N] change; `vec` [hidden, N] has passed silu.
    void operator()(Graph & g, Value & image_tokens, Value & text_tokens, Value vec, const Rotation & turn) const;
};

struct FluxSingleBlock {
    Scope      here;
    FluxConfig c;

    Linear      modulation{here.at("modulation.lin", "norm.linear"), c.hidden, 3 * c.hidden};
    FusedLinear linear1{here.at("linear1", ""),
                        c.hidden,
                        {{"attn.to_q", c.hidden}, {"attn.to_k", c.hidden}, {"attn.to_v", c.hidden}, {"proj_mlp", c.mlp}}};
    Linear      linear2{here.at("linear2", "proj_out"), c.hidden + c.mlp, c.hidden};
    RmsNorm     query_norm{here.at("norm.query_norm.scale", "attn.norm_q.weight"), c.head_size, 1e-6f, ""};
    RmsNorm     key_norm{here.at("norm.key_norm.scale", "attn.norm_k.weight"), c.head_size, 1e-6f, ""};

    Value operator()(Graph & g, Value x, Value vec, const Rotation & turn) const;
};

class Flux {
  public:
    Flux(const Scope & here, const std::string & axes);

    // latent [w, h, channels, N] of even sides, timesteps [N] from 0 to 1000, text [context, n, N],
    // pooled [pooled, N], guidance [N] or null, reference [w', h', channels, N] or null: what Kontext looks at
    // -> [w, h, channels out, N].
    Value operator()(Graph & g, Value latent, Value timesteps, Value text, Value pooled, Value guidance,
                     Value reference) const;

    const FluxConfig c;

  private:
    // Squares of a picture in rows, by the index of the picture.
    struct Grid {
        int64_t index, columns, rows;
    };
    Rotation rotation(Graph & g, int64_t text_tokens, const std::vector<Grid> & grids) const;

    Scope                        here_;
    Linear                       image_in_{here_.at("img_in", "x_embedder"), c.inputs, c.hidden};
    Linear                       text_in_{here_.at("txt_in", "context_embedder"), c.context, c.hidden};
    VectorEmbedder                time_in_;
    VectorEmbedder                pooled_in_;
    std::optional<VectorEmbedder> guidance_in_;
    std::vector<FluxDoubleBlock> double_;
    std::vector<FluxSingleBlock> single_;
    FusedLinear                  modulation_out_{here_.at("final_layer.adaLN_modulation.1", "norm_out.linear"),
                                                 c.hidden,
                                                 {{"", 2 * c.hidden, true}}};
    Linear                       out_{here_.at("final_layer.linear", "proj_out"), c.hidden, c.outputs};
};

} // namespace sd
