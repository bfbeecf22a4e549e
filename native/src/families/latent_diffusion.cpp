#include "families/latent_diffusion.h"

#include "core/error.h"
#include "families/distilled.h"

#include <cmath>
#include <cstdlib>

namespace sd {
namespace {

const std::string attention_of_text = ".transformer_blocks.0.attn2.to_k.weight"; // in a place with attention

const std::string * find_value(const Checkpoint & file, const char * key) {
    const auto found = file.metadata().find(key);
    return found == file.metadata().end() ? nullptr : &found->second;
}

} // namespace

LatentDiffusion::LatentDiffusion(WeightStore & weights, const OpenOptions & options, const Kind & kind)
    : bpe_(options.data_dir + "/clip_merges.txt"),
      unet_(weights.root("model.diffusion_model", "unet"), kind.unet, unet_text_input(weights.checkpoint())->ne[0]),
      kind_(kind),
      vae_(kind.wide_vae ? weights.root("first_stage_model", "vae").wide() : weights.root("first_stage_model", "vae")),
      scale_(kind.scale), defaults_(defaults_for(weights.checkpoint().path(), kind.defaults)),
      asked_zero_snr_(options.zero_snr) {
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
    zero_snr_ = read_zero_snr(file);
    // With "karras" two thirds of the steps would lie above where other models begin.
    if (zero_snr_ && std::string(defaults_.scheduler) == "karras") {
        defaults_.sampler = "euler";
        defaults_.scheduler = "simple";
    }

    // diffusers folders state the latent's side.
    const std::string * stated = find_value(file, "unet.sample_size");
    const int           cells = stated ? std::atoi(stated->c_str()) : 0;
    native_size_ = cells > 0 && cells <= 1024 ? cells * vae_.reduction() : native_size;
}

// As ComfyUI's users mark their files, or as diffusers' scheduler_config.json says.
bool LatentDiffusion::read_zero_snr(const Checkpoint & file) const {
    const std::string * stated = find_value(file, "rescale_betas_zero_snr");
    const bool          marked = file.has("ztsnr") || (stated && *stated == "true");
    if (asked_zero_snr_.value_or(marked) && prediction_ != Prediction::v) {
        fail(asked_zero_snr_ ? Status::bad_argument : Status::unsupported,
             "%s: zero terminal SNR with prediction eps; at its highest level there is noise alone, and eps says "
             "nothing of the picture: give prediction 'v', or zero_snr false",
             file.path().c_str());
    }
    return asked_zero_snr_.value_or(marked);
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
    constexpr int            most_blocks = 32; // on the way down
    std::vector<std::string> places{"model.diffusion_model.middle_block.1", "unet.mid_block.attentions.0"};
    for (int i = 0; i < most_blocks; ++i) { // where the middle has no attention
        places.push_back("model.diffusion_model.input_blocks." + std::to_string(i) + ".1");
        places.push_back("unet.down_blocks." + std::to_string(i) + ".attentions.0");
    }
    for (const std::string & place : places) {
        if (const StoredTensor * found = file.find(place + attention_of_text)) {
            return found;
        }
    }
    return nullptr;
}

const StoredTensor * unet_vector_input(const Checkpoint & file) {
    return find_any(file, {"model.diffusion_model.label_emb.0.0.weight", "unet.add_embedding.linear_1.weight"});
}

UnetFamily unet_family(const Checkpoint & file) {
    const StoredTensor * text = unet_text_input(file);
    if (!text) {
        return UnetFamily::none;
    }
    const std::string    place = text->name.substr(0, text->name.size() - attention_of_text.size());
    const StoredTensor * proj_in = file.find(place + ".proj_in.weight");
    if (!proj_in) {
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
