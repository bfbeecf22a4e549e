// CLIP's text tower (Radford et al., 2021): a causal transformer over 77 tokens, as OpenAI and as OpenCLIP
// (Cherti et al., 2023) trained it. Names as HF transformers' CLIPTextModel, which single files use for OpenAI's,
// and as OpenCLIP's own.
#pragma once

#include "nn/layers.h"

#include <optional>
#include <string>
#include <vector>

namespace sd {

struct ClipConfig {
    int64_t width, vocabulary, positions, layers, hidden;
    bool    quick; // activation x * sigmoid(1.702 x), as OpenAI's, else gelu
    bool    open;  // single files have OpenCLIP's names

    // Everything else is legible in the shapes; heads are 64 wide in every CLIP. `argument` is what a file with
    // this encoder can be given as.
    static ClipConfig read(const Scope & here, bool quick, bool open, const char * argument);

    // A place by its name in single files of OpenCLIP, and HF's.
    Scope at(const Scope & here, const std::string & open_name, const std::string & hf_name) const {
        return open ? here.at(open_name, hf_name) : here.at(hf_name);
    }
};

struct ClipLayer {
    Scope      here;
    ClipConfig c;

    // Queries, keys and values of one input: one matrix in OpenCLIP.
    struct Projections {
        const Weight * weight;
        const Weight * bias;
    };

    LayerNorm                  norm1{c.at(here, "ln_1", "layer_norm1"), c.width};
    std::optional<Projections> qkv = declare_qkv();
    std::optional<Linear>      q = declare_single("self_attn.q_proj");
    std::optional<Linear>      k = declare_single("self_attn.k_proj");
    std::optional<Linear>      v = declare_single("self_attn.v_proj");
    Linear                     out{c.at(here, "attn.out_proj", "self_attn.out_proj"), c.width, c.width};
    LayerNorm                  norm2{c.at(here, "ln_2", "layer_norm2"), c.width};
    Linear                     fc1{c.at(here, "mlp.c_fc", "mlp.fc1"), c.width, c.hidden};
    Linear                     fc2{c.at(here, "mlp.c_proj", "mlp.fc2"), c.hidden, c.width};

    Value operator()(Graph & g, Value x, Value mask) const;

  private:
    std::optional<Projections> declare_qkv() const;
    std::optional<Linear>      declare_single(const char * name) const;
};

class ClipText {
  public:
    // `here` holds "text_model" (HF), and "transformer" and "ln_final" (OpenCLIP).
    ClipText(const Scope & here, const ClipConfig & config);

    // ids [n, chunks] -> hidden states after all but the last `skip - 1` layers: [width, n, chunks]. Where the inputs
    // "keep" [1, n, chunks] and "learned" [width, n, chunks] (with this suffix) are given, learned vectors stand for
    // tokens.
    Value operator()(Graph & g, Value ids, int skip, const std::string & suffix = "") const;
    Value norm(Graph & g, Value states) const { return norm_(g, states); }

    // After all layers from the states after all but the last `skip - 1`.
    Value finish(Graph & g, Value states, int skip) const;

    // Each chunk's state at its end token, behind the last norm: states [width, n, chunks], ends [chunks], which
    // count the tokens of all chunks -> [width, chunks].
    Value pooled(Graph & g, Value states, Value ends) const;

    const ClipConfig c;

  private:
    Value run(Graph & g, Value x, int64_t first, int64_t end) const;

    Scope                  here_;
    Embedding              tokens_{c.at(here_, "token_embedding", "text_model.embeddings.token_embedding"), c.width,
                                   c.vocabulary};
    const Weight *         positions_;
    std::vector<ClipLayer> layers_;
    LayerNorm              norm_{c.at(here_, "ln_final", "text_model.final_layer_norm"), c.width};
};

} // namespace sd
