#include "models/unet.h"

#include "core/error.h"

namespace sd {

static std::string numbered(const char * before, int number, const char * after = "") {
    return before + std::to_string(number) + after;
}

Value ResBlock::operator()(Graph & g, Value x, Value t) const {
    Value h = conv1(g, g.silu(norm1(g, x)));
    h = g.add_to_channels(h, time(g, g.silu(t)));
    h = conv2(g, g.silu(norm2(g, h)));
    return g.add(h, shortcut ? (*shortcut)(g, x) : x);
}

Value CrossAttention::operator()(Graph & g, Value x, Value text) const {
    return out(g, g.attention(q(g, x), k(g, text), v(g, text), heads));
}

Value TransformerBlock::operator()(Graph & g, Value x, Value text) const {
    Value h = norm1(g, x);
    x = g.add(x, attn1(g, h, h));
    x = g.add(x, attn2(g, norm2(g, x), text));
    return g.add(x, down(g, g.geglu(up(g, norm3(g, x)))));
}

std::vector<TransformerBlock> SpatialTransformer::declare_blocks() const {
    std::vector<TransformerBlock> out;
    for (int i = 0;; ++i) {
        const Scope block = here.at(numbered("transformer_blocks.", i));
        if (!block.at("attn1.to_q").has()) {
            return out;
        }
        out.push_back({block, width, context, heads});
    }
}

Value SpatialTransformer::operator()(Graph & g, Value x, Value text) const {
    const auto [width_now, height_now] = g.size(x);
    Value h = proj_in(g, g.tokens(norm(g, x)));
    for (const TransformerBlock & block : blocks) {
        h = block(g, h, text);
    }
    return g.add(x, g.image(proj_out(g, h), width_now, height_now));
}

Unet::Unet(const Scope & here, const UnetKind & kind, int64_t context) : here_(here), kind_(kind), context_(context) {
    const StoredTensor * conv_in = here.at("input_blocks.0.0", "conv_in").find();
    const StoredTensor * conv_out = here.at("out.2", "conv_out").find();
    const StoredTensor * time1 = here.at("time_embed.0", "time_embedding.linear_1").find();
    if (!conv_in || !conv_out || !time1) {
        fail(Status::bad_file, "the UNet of Stable Diffusion is incomplete: %s or its diffusers name is missing",
             (!conv_in    ? here.at("input_blocks.0.0")
              : !conv_out ? here.at("out.2")
                          : here.at("time_embed.0"))
                 .name()
                 .c_str());
    }
    input_channels_ = conv_in->ne[2];
    base_ = conv_in->ne[3];
    output_channels_ = conv_out->ne[3];
    time_width_ = time1->ne[1];
    const Scope          label1 = here.at("label_emb.0.0", "add_embedding.linear_1");
    const StoredTensor * vector = kind.vector ? label1.find() : nullptr;
    vector_ = vector ? vector->ne[0] : 0;
    if (base_ % 32 != 0) {
        fail(Status::unsupported, "%s has %lld channels; the UNet's norms need a multiple of 32",
             conv_in->name.c_str(), static_cast<long long>(base_));
    }

    time1_ = {here.at("time_embed.0", "time_embedding.linear_1"), base_, time_width_};
    time2_ = {here.at("time_embed.2", "time_embedding.linear_2"), time_width_, time_width_};
    if (vector) {
        vector1_ = {label1, vector_, time_width_};
        vector2_ = {here.at("label_emb.0.2", "add_embedding.linear_2"), time_width_, time_width_};
    }
    conv_in_ = {here.at("input_blocks.0.0", "conv_in"), input_channels_, base_, 3};
    declare_down();
    declare_middle();
    declare_up();
    norm_out_ = {here.at("out.0", "conv_norm_out"), base_, 32, 1e-5f};
    conv_out_ = {here.at("out.2", "conv_out"), base_, output_channels_, 3};
}

SpatialTransformer Unet::transformer(const Scope & here, int64_t width) const {
    const int64_t heads = kind_.heads(width);
    if (heads < 1 || width % heads != 0) {
        fail(Status::unsupported, "%s: %lld channels do not divide into %lld heads", here.name().c_str(),
             static_cast<long long>(width), static_cast<long long>(heads));
    }
    return {here, width, context_, heads};
}

std::vector<int64_t> Unet::heads() const {
    std::vector<int64_t> out;
    for (const Level & level : levels_) {
        out.push_back(kind_.heads(level.width));
    }
    return out;
}

void Unet::declare_down() {
    int64_t width = base_;
    int     number = 1; // of input_blocks; 0 is conv_in
    skip_widths_.push_back(width);
    for (;;) {
        const std::string level_name = numbered("down_blocks.", static_cast<int>(levels_.size()));
        Level             level;
        for (;; ++level.residuals, ++number) {
            const auto scope = [&](const char * part, const char * diffusers) {
                return here_.at(numbered("input_blocks.", number, part), level_name + numbered(diffusers, level.residuals));
            };
            const Scope          residual = scope(".0", ".resnets."), attention = scope(".1", ".attentions.");
            const StoredTensor * kernel = residual.at("in_layers.2", "conv1").find();
            if (!kernel) {
                break;
            }
            Stage stage;
            stage.residual = {residual, width, kernel->ne[3], time_width_};
            width = kernel->ne[3];
            level.attends = attention.at("norm").has() || attention.at("proj_in").has();
            if (level.attends) {
                stage.transformer = transformer(attention, width);
            }
            down_.push_back(std::move(stage));
            skip_widths_.push_back(width);
        }
        level.width = width;
        levels_.push_back(level);
        const Scope halve = here_.at(numbered("input_blocks.", number, ".0.op"), level_name + ".downsamplers.0.conv");
        if (!halve.has()) {
            return;
        }
        Stage stage;
        stage.resize = {halve, width, width, 3, 2};
        down_.push_back(std::move(stage));
        skip_widths_.push_back(width);
        ++number;
    }
}

void Unet::declare_middle() {
    const int64_t deepest = skip_widths_.back();
    const Scope   first = here_.at("middle_block.0", "mid_block.resnets.0");
    const Scope   attention = here_.at("middle_block.1", "mid_block.attentions.0");
    const Scope   second = here_.at("middle_block.2", "mid_block.resnets.1");
    const auto    is_residual = [](const Scope & scope) {
        return scope.at("in_layers.0", "norm1").has() || scope.at("in_layers.2", "conv1").has();
    };
    const bool whole = attention.at("norm").has() || attention.at("proj_in").has() || is_residual(second);
    if (whole || is_residual(first)) {
        mid1_ = {first, deepest, deepest, time_width_};
    }
    if (whole) {
        mid_transformer_ = transformer(attention, deepest);
        mid2_ = {second, deepest, deepest, time_width_};
    }
}

// The way up mirrors the way down: a residual block for every skip of its level.
void Unet::declare_up() {
    std::vector<int64_t> skips = skip_widths_;
    int64_t              width = skips.back();
    int                  number = 0; // of output_blocks
    for (size_t index = 0; index < levels_.size(); ++index) {
        const Level &     level = levels_[levels_.size() - 1 - index];
        const std::string level_name = numbered("up_blocks.", static_cast<int>(index));
        for (int i = 0; i <= level.residuals; ++i, ++number) {
            const auto scope = [&](const char * part, const std::string & diffusers) {
                return here_.at(numbered("output_blocks.", number, part), level_name + diffusers);
            };
            Stage stage;
            stage.residual = {scope(".0", numbered(".resnets.", i)), width + skips.back(), level.width, time_width_};
            skips.pop_back();
            width = level.width;
            if (level.attends) {
                stage.transformer = transformer(scope(".1", numbered(".attentions.", i)), width);
            }
            if (i == level.residuals && index + 1 < levels_.size()) {
                stage.resize = {scope(level.attends ? ".2.conv" : ".1.conv", ".upsamplers.0.conv"), width, width, 3};
            }
            up_.push_back(std::move(stage));
        }
    }
}

Value Unet::operator()(Graph & g, Value latent, Value timesteps, Value text, Value vector) const {
    Value t = (*time2_)(g, g.silu((*time1_)(g, g.timestep_embedding(timesteps, base_))));
    if (vector1_) {
        t = g.add(t, (*vector2_)(g, g.silu((*vector1_)(g, vector))));
    }

    Value              x = (*conv_in_)(g, g.picture(latent));
    std::vector<Value> skips{x};
    for (const Stage & stage : down_) {
        x = stage.residual ? (*stage.residual)(g, x, t) : (*stage.resize)(g, x);
        if (stage.transformer) {
            x = (*stage.transformer)(g, x, text);
        }
        skips.push_back(x);
    }
    x = mid1_ ? (*mid1_)(g, x, t) : x;
    x = mid_transformer_ ? (*mid_transformer_)(g, x, text) : x;
    x = mid2_ ? (*mid2_)(g, x, t) : x;
    for (const Stage & stage : up_) {
        x = (*stage.residual)(g, g.concat_channels(x, skips.back()), t);
        skips.pop_back();
        if (stage.transformer) {
            x = (*stage.transformer)(g, x, text);
        }
        if (stage.resize) { // to the skip's size: an odd one was halved upwards
            const auto [width, height] = g.size(skips.back());
            x = (*stage.resize)(g, g.upsample(x, width, height));
        }
    }
    return g.planes((*conv_out_)(g, g.silu((*norm_out_)(g, x))));
}

} // namespace sd
