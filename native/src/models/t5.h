// The encoder of T5 v1.1 (Raffel et al., 2020, "Exploring the Limits of Transfer Learning with a Unified
// Text-to-Text Transformer"; gated as in Shazeer, 2020, "GLU Variants Improve Transformer").
// Names as HF transformers' T5EncoderModel; llama.cpp's are given these where a file is opened.
#pragma once

#include "nn/layers.h"

#include <vector>

namespace sd {

struct T5Config {
    int64_t width, vocabulary, layers, heads, inner, hidden, buckets; // inner: all heads side by side

    // Everything is legible in the shapes. Throws Error where there is no T5, or one of another kind.
    static T5Config read(const Scope & t5);
};

struct T5Block {
    Scope    here;
    T5Config c;

    RmsNorm norm1{here.at("layer.0.layer_norm"), c.width, 1e-6f};
    Linear  q{here.at("layer.0.SelfAttention.q"), c.width, c.inner, false};
    Linear  k{here.at("layer.0.SelfAttention.k"), c.width, c.inner, false};
    Linear  v{here.at("layer.0.SelfAttention.v"), c.width, c.inner, false};
    Linear  o{here.at("layer.0.SelfAttention.o"), c.inner, c.width, false};
    RmsNorm norm2{here.at("layer.1.layer_norm"), c.width, 1e-6f};
    Linear  gate{here.at("layer.1.DenseReluDense.wi_0"), c.width, c.hidden, false};
    Linear  up{here.at("layer.1.DenseReluDense.wi_1"), c.width, c.hidden, false};
    Linear  down{here.at("layer.1.DenseReluDense.wo"), c.hidden, c.width, false};

    Value operator()(Graph & g, Value x, Value bias) const;
};

class T5Encoder {
  public:
    // `t5` is where "shared" and "encoder" are: root("text_encoders.t5xxl.transformer", "text_encoder_2").
    T5Encoder(const Scope & t5, const T5Config & config);

    // ids [n, N] -> [width, n, N], after the final norm. `mask` [n, N] is 1 for tokens that are seen and 0 for
    // padding; null: all are seen, which is how SD3 and FLUX were trained.
    Value operator()(Graph & g, Value ids, Value mask = nullptr) const;

    const T5Config c;

  private:
    Scope                here_;
    Embedding            tokens_;
    Embedding            distances_{here_.at("encoder.block.0.layer.0.SelfAttention.relative_attention_bias"), c.heads,
                                    c.buckets};
    std::vector<T5Block> blocks_;
    RmsNorm              norm_{here_.at("encoder.final_layer_norm"), c.width, 1e-6f};
};

} // namespace sd
