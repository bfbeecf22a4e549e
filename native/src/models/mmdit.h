// The multimodal diffusion transformer of Stable Diffusion 3 and 3.5 (Esser et al., 2024, "Scaling Rectified Flow
// Transformers for High-Resolution Image Synthesis"): text and picture have weights of their own and attend to each
// other. Names as Stability AI's checkpoints, and as diffusers' SD3Transformer2DModel.
#pragma once

#include "nn/layers.h"

#include <optional>
#include <string>
#include <vector>

namespace sd {

struct MmditConfig {
    int64_t hidden, head_size;
    int64_t channels, outputs; // of a latent cell, and features that a square of 2 x 2 cells gets
    int64_t context, pooled;   // features of the text's tokens, and of its one vector
    int64_t positions;         // squares on a side of the largest picture
    int64_t blocks;

    int64_t heads() const { return hidden / head_size; }

    // All is legible in the shapes; heads are 64 wide where no norm tells.
    static MmditConfig read(const Scope & mmdit);
};

// Queries, keys and values of one sequence, and where it goes on, the way out.
struct MmditAttention {
    Scope                    here;
    MmditConfig              c;
    std::vector<std::string> diffusers; // to_q, to_k, to_v, norm_q, norm_k, to_out.0 as this side calls them
    bool                     has_out;

    FusedLinear             qkv{here.at("qkv", ""),
                                c.hidden,
                                {{diffusers[0], c.hidden}, {diffusers[1], c.hidden}, {diffusers[2], c.hidden}}};
    std::optional<HeadNorm> query_norm = norm("ln_q.weight", diffusers[3]);
    std::optional<HeadNorm> key_norm = norm("ln_k.weight", diffusers[4]);
    std::optional<Linear>   out = way_out();

    // [hidden, T, N] -> three of [head size, heads, T, N]
    std::vector<Value> operator()(Graph & g, Value x) const;

  private:
    std::optional<HeadNorm> norm(const char * name, const std::string & diffusers_name) const; // SD 3.5 has them
    std::optional<Linear>   way_out() const;
};

// The weights of one side of a block. The text's side of the last block ends at the attention.
struct MmditStream {
    Scope       here; // "x_block" or "context_block", and diffusers' block
    MmditConfig c;
    bool        is_text, goes_on;

    // SD 3.5 medium looks at the picture a second time in its first blocks.
    bool        twice = !is_text && here.at("attn2.qkv", "attn2.to_q").has();
    FusedLinear modulation{here.at("adaLN_modulation.1", is_text ? "norm1_context.linear" : "norm1.linear"),
                           c.hidden,
                           {{"", (twice ? 9 : goes_on ? 6 : 2) * c.hidden, !goes_on}}};

    MmditAttention                attention = attend("attn");
    std::optional<MmditAttention> attention2 = attend_again();
    std::optional<Linear> mlp1 = mlp("fc1", "net.0.proj", c.hidden, 4 * c.hidden);
    std::optional<Linear> mlp2 = mlp("fc2", "net.2", 4 * c.hidden, c.hidden);

  private:
    MmditAttention                attend(const char * name) const;
    std::optional<MmditAttention> attend_again() const;
    std::optional<Linear>         mlp(const char * name, const std::string & diffusers, int64_t in, int64_t out) const;
};

struct MmditBlock {
    Scope       here;
    MmditConfig c;
    bool        is_last;

    MmditStream image{here.at("x_block", ""), c, false, true};
    MmditStream text{here.at("context_block", ""), c, true, !is_last};

    // Both sequences [hidden, T, N] change, the text's not in the last block; `vec` [hidden, N] has passed silu.
    void operator()(Graph & g, Value & image_tokens, Value & text_tokens, Value vec) const;
};

// Two layers that bring a vector into the modulation.
struct MmditVector {
    Scope   here;
    int64_t in, hidden;

    Linear first{here.at("mlp.0", "linear_1"), in, hidden};
    Linear second{here.at("mlp.2", "linear_2"), hidden, hidden};

    Value operator()(Graph & g, Value x) const { return second(g, g.silu(first(g, x))); }
};

class Mmdit {
  public:
    explicit Mmdit(const Scope & here);

    // latent [w, h, channels, N] of even sides, timesteps [N] from 0 to 1000, text [context, n, N], pooled
    // [pooled, N] -> [w, h, channels, N].
    Value operator()(Graph & g, Value latent, Value timesteps, Value text, Value pooled) const;

    const MmditConfig c;

  private:
    Value positions(Graph & g, int64_t columns, int64_t rows) const;

    Scope                   here_;
    Conv2d                  image_in_{here_.at("x_embedder.proj", "pos_embed.proj"), c.channels, c.hidden, 2, 2, 0};
    const Weight *          positions_ = here_.at("pos_embed", "pos_embed.pos_embed").table("", c.hidden, c.positions * c.positions);
    Linear                  text_in_{here_.at("context_embedder"), c.context, c.hidden};
    MmditVector             time_in_;
    MmditVector             pooled_in_;
    std::vector<MmditBlock> blocks_;
    FusedLinear             modulation_out_{here_.at("final_layer.adaLN_modulation.1", "norm_out.linear"),
                                            c.hidden,
                                            {{"", 2 * c.hidden, true}}};
    Linear                  out_{here_.at("final_layer.linear", "proj_out"), c.hidden, c.outputs};
};

} // namespace sd
