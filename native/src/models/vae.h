// The autoencoder of Stable Diffusion: pictures to latents at an eighth of their size and back (Esser et al.,
// 2021; Rombach et al., 2022). Names as the original checkpoints, and as diffusers' AutoencoderKL.
#pragma once

#include "nn/layers.h"

#include <optional>
#include <vector>

namespace sd {

struct VaeResBlock {
    Scope   here;
    int64_t in, out;
    int     groups;

    GroupNorm             norm1{here.at("norm1"), in, groups, 1e-6f};
    Conv2d                conv1{here.at("conv1"), in, out, 3};
    GroupNorm             norm2{here.at("norm2"), out, groups, 1e-6f};
    Conv2d                conv2{here.at("conv2"), out, out, 3};
    std::optional<Conv2d> shortcut = shortcut_between(here.at("nin_shortcut", "conv_shortcut"), in, out);

    Value operator()(Graph & g, Value x) const;
};

// One head over all cells. The matrices are 1x1 convolutions in single files.
struct VaeAttention {
    Scope   here;
    int64_t width;
    int     groups;

    GroupNorm norm{here.at("norm", "group_norm"), width, groups, 1e-6f};
    Linear    q{here.at("q", "to_q"), width, width};
    Linear    k{here.at("k", "to_k"), width, width};
    Linear    v{here.at("v", "to_v"), width, width};
    Linear    out{here.at("proj_out", "to_out.0"), width, width};

    Value operator()(Graph & g, Value x) const;
};

struct VaeMiddle {
    Scope   here;
    int64_t width;
    int     groups;

    VaeResBlock  block1{here.at("block_1", "resnets.0"), width, width, groups};
    VaeAttention attention{here.at("attn_1", "attentions.0"), width, groups};
    VaeResBlock  block2{here.at("block_2", "resnets.1"), width, width, groups};

    Value operator()(Graph & g, Value x) const { return block2(g, attention(g, block1(g, x))); }
};

struct VaeLevel {
    std::vector<VaeResBlock> blocks;
    std::optional<Conv2d>    resize;
};

class Vae {
  public:
    // Reads its structure from the shapes in the files.
    explicit Vae(const Scope & here);

    int64_t latent_channels() const { return latent_channels_; }
    int     reduction() const { return 1 << (encoder_.size() - 1); } // pixels a latent cell is wide

    // [W, H, 3, N] in -1..1 -> mean and log-variance [w, h, 2 * latent_channels, N]
    Value encode(Graph & g, Value image) const;
    // [w, h, latent_channels, N] -> [W, H, 3, N]
    Value decode(Graph & g, Value latent) const;

  private:
    void declare_encoder(const Scope & here);
    void declare_decoder(const Scope & here);

    int64_t latent_channels_, base_, deepest_ = 0;
    int     groups_;

    std::optional<Conv2d>    encoder_in_, encoder_out_, decoder_in_, decoder_out_;
    std::optional<GroupNorm> encoder_norm_, decoder_norm_;
    std::optional<VaeMiddle> encoder_middle_, decoder_middle_;
    std::vector<VaeLevel>    encoder_, decoder_; // in the order of the computation
    std::optional<Conv2d>    quant_, post_quant_; // SD 1.x to XL have these, SD3 and FLUX not
};

} // namespace sd
