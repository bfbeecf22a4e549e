// The denoiser of Stable Diffusion 1.x, 2.x and XL: residual and transformer blocks at several sizes (Rombach
// et al., 2022; Podell et al., 2023). Names as the original checkpoints, and as diffusers'
// UNet2DConditionModel.
#pragma once

#include "nn/layers.h"

#include <optional>
#include <vector>

namespace sd {

// What no shape tells.
struct UnetKind {
    int64_t head_count; // heads at every width, or 0 and
    int64_t head_size;  // the width of each
    bool    vector;     // takes one for each picture as a whole

    int64_t heads(int64_t width) const { return head_count > 0 ? head_count : width / head_size; }
};

// Two convolutions around a time signal, with a shortcut.
struct ResBlock {
    Scope   here;
    int64_t in, out, time_width;

    GroupNorm             norm1{here.at("in_layers.0", "norm1"), in, 32, 1e-5f};
    Conv2d                conv1{here.at("in_layers.2", "conv1"), in, out, 3};
    Linear                time{here.at("emb_layers.1", "time_emb_proj"), time_width, out};
    GroupNorm             norm2{here.at("out_layers.0", "norm2"), out, 32, 1e-5f};
    Conv2d                conv2{here.at("out_layers.3", "conv2"), out, out, 3};
    std::optional<Conv2d> shortcut = shortcut_between(here.at("skip_connection", "conv_shortcut"), in, out);

    // x [W, H, in, N], time signal [time_width, N] -> [W, H, out, N]
    Value operator()(Graph & g, Value x, Value t) const;
};

struct CrossAttention {
    Scope   here;
    int64_t width, context, heads;

    Linear q{here.at("to_q"), width, width, false};
    Linear k{here.at("to_k"), context, width, false};
    Linear v{here.at("to_v"), context, width, false};
    Linear out{here.at("to_out.0"), width, width};

    Value operator()(Graph & g, Value x, Value text) const;
};

// Self-attention, attention to the text, and a gated feed-forward layer: [width, T, N].
struct TransformerBlock {
    Scope   here;
    int64_t width, context, heads;

    LayerNorm      norm1{here.at("norm1"), width};
    CrossAttention attn1{here.at("attn1"), width, width, heads};
    LayerNorm      norm2{here.at("norm2"), width};
    CrossAttention attn2{here.at("attn2"), width, context, heads};
    LayerNorm      norm3{here.at("norm3"), width};
    Linear         up{here.at("ff.net.0.proj"), width, 8 * width};
    Linear         down{here.at("ff.net.2"), 4 * width, width};

    Value operator()(Graph & g, Value x, Value text) const;
};

// Transformer blocks over the cells of an image. proj_in and proj_out are 1x1 convolutions in the files of
// SD 1.x and matrices in later ones: the same elements, the same product.
struct SpatialTransformer {
    Scope   here;
    int64_t width, context, heads;

    GroupNorm                     norm{here.at("norm"), width, 32, 1e-6f};
    Linear                        proj_in{here.at("proj_in"), width, width};
    std::vector<TransformerBlock> blocks = declare_blocks();
    Linear                        proj_out{here.at("proj_out"), width, width};

    Value operator()(Graph & g, Value x, Value text) const;

  private:
    std::vector<TransformerBlock> declare_blocks() const;
};

class Unet {
  public:
    // Reads its structure from the names and shapes in the files: any number of levels, residual blocks and transformer
    // blocks, and a middle that may be whole, one residual block (SSD-1B, Segmind Vega), or nothing (KOALA, BK-SDM).
    // `context` is the width of the text.
    Unet(const Scope & here, const UnetKind & kind, int64_t context);

    int64_t input_channels() const { return input_channels_; }
    int64_t output_channels() const { return output_channels_; }
    int64_t context_width() const { return context_; }
    std::vector<int64_t> heads() const; // of each level, from the top
    int64_t vector_width() const { return vector_; } // 0: it takes none

    // latent [W, H, C, N], timesteps [N], text [context, n, N], and where it takes one a vector
    // [vector_width, N] for each picture as a whole -> [W, H, C, N]
    Value operator()(Graph & g, Value latent, Value timesteps, Value text, Value vector = nullptr) const;

  private:
    // What stands at one number of `input_blocks` or `output_blocks`.
    struct Stage {
        std::optional<ResBlock>           residual;
        std::optional<SpatialTransformer> transformer;
        std::optional<Conv2d>             resize; // after halving (down) or doubling (up)
    };

    // A size at which the network works.
    struct Level {
        int64_t width = 0;
        int     residuals = 0; // on the way down; one more on the way up
        bool    attends = false;
    };

    SpatialTransformer transformer(const Scope & here, int64_t width) const;
    void               declare_down();
    void               declare_middle();
    void               declare_up();

    Scope     here_;
    UnetKind  kind_;
    int64_t   input_channels_, base_, time_width_, context_, vector_, output_channels_;
    std::vector<Level> levels_;

    std::optional<Linear>             time1_, time2_;
    std::optional<Linear>             vector1_, vector2_;
    std::optional<Conv2d>             conv_in_;
    std::vector<Stage>                down_;
    std::vector<int64_t>              skip_widths_;
    std::optional<ResBlock>           mid1_, mid2_;
    std::optional<SpatialTransformer> mid_transformer_;
    std::vector<Stage>                up_;
    std::optional<GroupNorm>          norm_out_;
    std::optional<Conv2d>             conv_out_;
};

} // namespace sd
