#include "models/vae.h"

#include "core/error.h"

#include <algorithm>

namespace sd {

Value VaeResBlock::operator()(Graph & g, Value x) const {
    Value h = conv1(g, g.silu(norm1(g, x)));
    h = conv2(g, g.silu(norm2(g, h)));
    return g.add(h, shortcut ? (*shortcut)(g, x) : x);
}

Value VaeAttention::operator()(Graph & g, Value x) const {
    const auto [width_now, height_now] = g.size(x);
    Value h = g.tokens(norm(g, x));
    h = out(g, g.attention(q(g, h), k(g, h), v(g, h), 1));
    return g.add(x, g.image(h, width_now, height_now));
}

Vae::Vae(const Scope & here) {
    const StoredTensor * conv_in = here.at("encoder.conv_in").find();
    const StoredTensor * decoder_in = here.at("decoder.conv_in").find();
    if (!conv_in || !decoder_in) {
        fail(Status::bad_file, "no autoencoder was found (%s.%s.conv_in); give it as vae=", here.name().c_str(),
             conv_in ? "decoder" : "encoder");
    }
    base_ = conv_in->ne[3];
    latent_channels_ = decoder_in->ne[2];
    // No shape tells the number of groups. Stable Diffusion's 128 channels have 32, and smaller networks as many
    // channels a group: with one channel a group the last norm would erase the colours of a picture.
    groups_ = static_cast<int>(std::clamp<int64_t>(base_ / 4, 1, 32));
    declare_encoder(here.at("encoder"));
    declare_decoder(here.at("decoder"));
    quant_ = {here.at("quant_conv"), 2 * latent_channels_, 2 * latent_channels_, 1};
    post_quant_ = {here.at("post_quant_conv"), latent_channels_, latent_channels_, 1};
}

void Vae::declare_encoder(const Scope & here) {
    encoder_in_ = {here.at("conv_in"), 3, base_, 3};
    int64_t width = base_;
    for (int i = 0;; ++i) {
        const std::string number = std::to_string(i);
        const Scope       level_scope = here.at("down." + number, "down_blocks." + number);
        VaeLevel          level;
        for (int j = 0;; ++j) {
            const Scope block = level_scope.at("block." + std::to_string(j), "resnets." + std::to_string(j));
            const StoredTensor * kernel = block.at("conv1").find();
            if (!kernel) {
                break;
            }
            level.blocks.push_back({block, width, kernel->ne[3], groups_});
            width = kernel->ne[3];
        }
        const Scope halve = level_scope.at("downsample.conv", "downsamplers.0.conv");
        const bool  last = !halve.has();
        if (!last) {
            level.resize = {halve, width, width, 3, 2, 0};
        }
        encoder_.push_back(std::move(level));
        if (last) {
            break;
        }
    }
    deepest_ = width;
    encoder_middle_ = {here.at("mid", "mid_block"), width, groups_};
    encoder_norm_ = {here.at("norm_out", "conv_norm_out"), width, groups_, 1e-6f};
    encoder_out_ = {here.at("conv_out"), width, 2 * latent_channels_, 3};
}

// Mirrors the encoder: one residual block more at each level. Single files number the levels from the
// picture, diffusers from the latent.
void Vae::declare_decoder(const Scope & here) {
    decoder_in_ = {here.at("conv_in"), latent_channels_, deepest_, 3};
    decoder_middle_ = {here.at("mid", "mid_block"), deepest_, groups_};
    int64_t      width = deepest_;
    const size_t levels = encoder_.size();
    for (size_t i = 0; i < levels; ++i) {
        const VaeLevel & mirror = encoder_[levels - 1 - i];
        const Scope level_scope = here.at("up." + std::to_string(levels - 1 - i), "up_blocks." + std::to_string(i));
        VaeLevel    level;
        for (size_t j = 0; j <= mirror.blocks.size(); ++j) {
            const int64_t out = mirror.blocks.empty() ? width : mirror.blocks.back().out;
            level.blocks.push_back({level_scope.at("block." + std::to_string(j), "resnets." + std::to_string(j)),
                                    width, out, groups_});
            width = out;
        }
        if (i + 1 < levels) {
            level.resize = {level_scope.at("upsample.conv", "upsamplers.0.conv"), width, width, 3};
        }
        decoder_.push_back(std::move(level));
    }
    decoder_norm_ = {here.at("norm_out", "conv_norm_out"), width, groups_, 1e-6f};
    decoder_out_ = {here.at("conv_out"), width, 3, 3};
}

Value Vae::encode(Graph & g, Value image) const {
    Value x = (*encoder_in_)(g, g.picture(image));
    for (const VaeLevel & level : encoder_) {
        for (const VaeResBlock & block : level.blocks) {
            x = block(g, x);
        }
        if (level.resize) {
            x = (*level.resize)(g, g.pad(x, 1, 1));
        }
    }
    x = (*encoder_middle_)(g, x);
    return g.planes((*quant_)(g, (*encoder_out_)(g, g.silu((*encoder_norm_)(g, x)))));
}

Value Vae::decode(Graph & g, Value latent) const {
    Value x = (*decoder_in_)(g, (*post_quant_)(g, g.picture(latent)));
    x = (*decoder_middle_)(g, x);
    for (const VaeLevel & level : decoder_) {
        for (const VaeResBlock & block : level.blocks) {
            x = block(g, x);
        }
        if (level.resize) {
            const auto [width, height] = g.size(x);
            x = (*level.resize)(g, g.upsample(x, 2 * width, 2 * height));
        }
    }
    return g.planes((*decoder_out_)(g, g.silu((*decoder_norm_)(g, x))));
}

} // namespace sd
