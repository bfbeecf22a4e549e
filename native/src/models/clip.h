// CLIP's text tower (Radford et al., 2021): a causal transformer over 77 tokens.
// Names as HF transformers' CLIPTextModel, which single files use as well.
#pragma once

#include "nn/layers.h"

#include <vector>

namespace sd {

struct ClipConfig {
    int64_t width, vocabulary, positions, layers, hidden;
    bool    quick; // activation x * sigmoid(1.702 x), else gelu

    // Everything is legible in the shapes; heads are 64 wide in every CLIP.
    static ClipConfig read(const Scope & text_model, bool quick);
};

struct ClipLayer {
    Scope      here;
    ClipConfig c;

    LayerNorm norm1{here.at("layer_norm1"), c.width};
    Linear    q{here.at("self_attn.q_proj"), c.width, c.width};
    Linear    k{here.at("self_attn.k_proj"), c.width, c.width};
    Linear    v{here.at("self_attn.v_proj"), c.width, c.width};
    Linear    out{here.at("self_attn.out_proj"), c.width, c.width};
    LayerNorm norm2{here.at("layer_norm2"), c.width};
    Linear    fc1{here.at("mlp.fc1"), c.width, c.hidden};
    Linear    fc2{here.at("mlp.fc2"), c.hidden, c.width};

    Value operator()(Graph & g, Value x, Value mask) const;
};

class ClipText {
  public:
    ClipText(const Scope & text_model, const ClipConfig & config);

    // ids [n, chunks] -> hidden states after all but the last `skip - 1` layers, then the final norm:
    // [width, n, chunks].
    Value operator()(Graph & g, Value ids, int skip) const;

    const ClipConfig c;

  private:
    Scope                  here_;
    Embedding              tokens_{here_.at("embeddings.token_embedding"), c.width, c.vocabulary};
    Embedding              positions_{here_.at("embeddings.position_embedding"), c.width, c.positions};
    std::vector<ClipLayer> layers_;
    LayerNorm              norm_{here_.at("final_layer_norm"), c.width};
};

} // namespace sd
