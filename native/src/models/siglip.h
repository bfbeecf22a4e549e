// SigLIP's image tower (Zhai et al., 2023, "Sigmoid Loss for Language Image Pre-Training"): a plain transformer over the
// squares of a picture. Names as HF transformers' SiglipVisionModel.
#pragma once

#include "nn/layers.h"

#include <vector>

namespace sd {

struct SiglipConfig {
    int64_t width, hidden, layers, head_size;
    int64_t square, positions; // pixels of a square's side, and how many squares

    // All is legible in the shapes but the heads: 72 wide in so400m, whose width they divide, else 64.
    static SiglipConfig read(const Scope & vision);

    int64_t side() const; // of a picture, in pixels
};

struct SiglipLayer {
    Scope        here;
    SiglipConfig c;

    LayerNorm norm1{here.at("layer_norm1"), c.width, 1e-6f};
    Linear    q{here.at("self_attn.q_proj"), c.width, c.width};
    Linear    k{here.at("self_attn.k_proj"), c.width, c.width};
    Linear    v{here.at("self_attn.v_proj"), c.width, c.width};
    Linear    out{here.at("self_attn.out_proj"), c.width, c.width};
    LayerNorm norm2{here.at("layer_norm2"), c.width, 1e-6f};
    Linear    fc1{here.at("mlp.fc1"), c.width, c.hidden};
    Linear    fc2{here.at("mlp.fc2"), c.hidden, c.width};

    Value operator()(Graph & g, Value x) const;
};

class Siglip {
  public:
    // `here` is where "vision_model" is.
    explicit Siglip(const Scope & here);

    // image [side, side, 3, N] of -1 to 1 -> [width, squares, N], behind the last norm.
    Value operator()(Graph & g, Value image) const;

    const SiglipConfig c;

  private:
    Scope                    here_;
    Conv2d                   squares_{here_.at("embeddings.patch_embedding"), 3, c.width, static_cast<int>(c.square),
                                      static_cast<int>(c.square), 0};
    const Weight *           positions_ = here_.at("embeddings.position_embedding").table("weight", c.width, c.positions);
    std::vector<SiglipLayer> layers_;
    LayerNorm                norm_{here_.at("post_layernorm"), c.width, 1e-6f};
};

} // namespace sd
