#include "families/latent_diffusion.h"

#include "core/error.h"
#include "families/distilled.h"

#include <cmath>
#include <cstdlib>

namespace sd {
namespace {

const std::string * find_value(const Checkpoint & file, const char * key) {
    const auto found = file.metadata().find(key);
    return found == file.metadata().end() ? nullptr : &found->second;
}

} // namespace

LatentDiffusion::LatentDiffusion(WeightStore & weights, const OpenOptions & options, const Kind & kind)
    : bpe_(options.data_dir + "/clip_merges.txt"), unet_(weights.root("model.diffusion_model", "unet"), kind.unet),
      kind_(kind),
      vae_(kind.wide_vae ? weights.root("first_stage_model", "vae").wide() : weights.root("first_stage_model", "vae")),
      scale_(kind.scale), defaults_(defaults_for(weights.checkpoint().path(), kind.defaults)) {
    if (const std::string * stated = find_value(weights.checkpoint(), "vae.scaling_factor")) {
        const float scale = std::strtof(stated->c_str(), nullptr);
        scale_ = std::isfinite(scale) && scale > 0 ? scale : scale_;
    }
}

void LatentDiffusion::complete(WeightStore & weights, int64_t text_width, Prediction prediction, int native_size) {
    weights.check();
    weights.check_all_used({"model.diffusion_model", "unet"});
    const Checkpoint & file = weights.checkpoint();
    if (unet_.context_width() != text_width) {
        fail(Status::unsupported, "%s: the UNet reads text %lld wide, but the text encoder writes %lld",
             file.path().c_str(), static_cast<long long>(unet_.context_width()), static_cast<long long>(text_width));
    }
    const int64_t latent = vae_.latent_channels(), in = unet_.input_channels();
    if (unet_.output_channels() != latent || (in != latent && in != 2 * latent && in != 2 * latent + 1)) {
        fail(Status::unsupported, "%s: a UNet of %lld to %lld channels does not fit an autoencoder of %lld",
             file.path().c_str(), static_cast<long long>(in), static_cast<long long>(unet_.output_channels()),
             static_cast<long long>(latent));
    }
    check_heads(file);
    prediction_ = prediction;

    // diffusers folders state the latent's side.
    const std::string * stated = find_value(file, "unet.sample_size");
    const int           cells = stated ? std::atoi(stated->c_str()) : 0;
    native_size_ = cells > 0 && cells <= 1024 ? cells * vae_.reduction() : native_size;
}

void LatentDiffusion::check_heads(const Checkpoint & file) const {
    // diffusers' misnomer for the number of heads, for all levels or for each: "8", "5,10,20".
    const std::string * stated = find_value(file, "unet.attention_head_dim");
    if (!stated) {
        return;
    }
    const char * at = stated->c_str();
    for (const int64_t heads : unet_.heads()) {
        if (std::atoll(at) != heads) {
            fail(Status::unsupported, "%s: its UNet has attention_head_dim %s; %s has %lld heads there",
                 file.path().c_str(), stated->c_str(), kind_.name, static_cast<long long>(heads));
        }
        const size_t comma = std::string(at).find(',');
        at += comma == std::string::npos ? 0 : comma + 1;
    }
}

Conditioning LatentDiffusion::encode_alone(Runner & runner, const Prompt & prompt, int32_t padding, int clip_skip,
                                           int chunks) const {
    const ClipPrompt    read(bpe_, prompt, padding, chunks, learned_.words());
    const LearnedInputs learned(read.chunks, learned_, 0);
    const Tensor        ids = read.ids();
    Inputs              inputs{{"ids", &ids}};
    learned.add_to(inputs);
    auto outputs = runner.run("text" + std::to_string(clip_skip), inputs, [&](Graph & g) { text(g, clip_skip); });
    Tensor & states = outputs.at("states");
    read.emphasise(states, 0, states.ne[0]);
    return {{{"text", join_chunks(std::move(states))}}, {}};
}

void LatentDiffusion::check_tokens(const Checkpoint & file, int64_t vocabulary, int64_t positions) {
    if (vocabulary <= ClipBpe::end_token || positions < 77) {
        fail(Status::unsupported, "%s: a text encoder of %lld tokens and %lld positions is not CLIP's (49408 and 77)",
             file.path().c_str(), static_cast<long long>(vocabulary), static_cast<long long>(positions));
    }
}

std::optional<Prediction> stated_prediction(const Checkpoint & file, const std::string & asked) {
    std::string name = asked;
    if (name.empty() && file.has("v_pred")) {
        name = "v";
    }
    for (const char * key : {"prediction_type", "modelspec.prediction_type"}) {
        const std::string * value = find_value(file, key);
        name = name.empty() && value ? *value : name;
    }
    if (name.empty()) {
        return std::nullopt;
    }
    if (name == "v" || name == "v_prediction") {
        return Prediction::v;
    }
    if (name == "eps" || name == "epsilon") {
        return Prediction::eps;
    }
    fail(asked.empty() ? Status::unsupported : Status::bad_argument,
         "%s: prediction '%s' is not known; there are: eps, v", file.path().c_str(), name.c_str());
}

const StoredTensor * unet_text_input(const Checkpoint & file) {
    return find_any(file, {"model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight",
                           "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"});
}

const StoredTensor * unet_vector_input(const Checkpoint & file) {
    return find_any(file, {"model.diffusion_model.label_emb.0.0.weight", "unet.add_embedding.linear_1.weight"});
}

UnetFamily unet_family(const Checkpoint & file) {
    const StoredTensor * text = unet_text_input(file);
    const StoredTensor * proj_in = find_any(file, {"model.diffusion_model.middle_block.1.proj_in.weight",
                                                   "unet.mid_block.attentions.0.proj_in.weight"});
    if (!text || !proj_in) {
        return UnetFamily::none;
    }
    // A quantised proj_in is a matrix in any family; then the encoder tells, or the width of what it writes.
    const bool clip_l = file.has("cond_stage_model.transformer.text_model.embeddings.token_embedding.weight");
    const bool clip_h = file.has("cond_stage_model.model.token_embedding.weight");
    if (!clip_l && !clip_h && unet_vector_input(file)) {
        return UnetFamily::sdxl;
    }
    if (clip_h) {
        return UnetFamily::sd2;
    }
    return proj_in->dims == 4 || clip_l || text->ne[0] == 768 ? UnetFamily::sd1 : UnetFamily::sd2;
}

const StoredTensor * find_any(const Checkpoint & file, std::initializer_list<const char *> names) {
    for (const char * name : names) {
        if (const StoredTensor * found = file.find(name)) {
            return found;
        }
    }
    return nullptr;
}

} // namespace sd
