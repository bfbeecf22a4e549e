// FLUX.1 (Black Forest Labs, 2024): CLIP-L's one vector and T5's tokens, a transformer that was distilled to
// take its guidance as an input (dev, Fill, Canny, Depth, Kontext) or to need none (schnell), and an autoencoder of
// 16 channels. Kontext has dev's structure, and nothing in its weights tells them apart: a request with a reference
// picture is for it.
#include "models/flux.h"
#include "core/error.h"
#include "families/clip_prompt.h"
#include "families/components.h"
#include "families/distilled.h"
#include "families/family.h"
#include "families/flow_shift.h"
#include "families/redux.h"
#include "families/t5_text.h"
#include "models/clip.h"
#include "models/vae.h"

namespace sd {
namespace {

class Flux1 final : public Pipeline {
  public:
    Flux1(WeightStore & weights, const OpenOptions & options)
        : bpe_(options.data_dir + "/clip_merges.txt"),
          flux_(weights.root("model.diffusion_model", "transformer"), axes(weights.checkpoint())),
          clip_scope_(weights.root("text_encoders.clip_l.transformer", "text_encoder")),
          clip_(clip_scope_, ClipConfig::read(clip_scope_, true, false, "clip_l")),
          t5_(weights.checkpoint(), weights.root("text_encoders.t5xxl.transformer", "text_encoder_2"),
              options.data_dir),
          vae_(weights.root("first_stage_model", "vae")),
          redux_(Redux::find(weights, weights.root("clip_vision", "image_encoder"),
                             weights.root("redux", "image_embedder"), flux_.c.context)) {
        weights.check();
        weights.check_all_used({"model.diffusion_model", "transformer"});
        check_fit(weights.checkpoint());
        // schnell was trained without a shift.
        shift_ = FlowShift::read(weights.checkpoint(), {1, flux_.c.guidance});
        defaults_ = distilled_flow(weights.checkpoint().path(), usual(weights.checkpoint().path()), 8);
    }

    Defaults defaults() const override { return defaults_; }

    Prediction prediction() const override { return Prediction::flow; }
    LatentFormat latent_format() const override {
        return {vae_.latent_channels(), vae_.reduction(), 0.3611f, 0.1159f};
    }
    int input_channels() const override { return static_cast<int>(flux_.c.inputs / 4); }
    int size_multiple() const override { return 2 * vae_.reduction(); }
    int native_size() const override { return 1024; }

    NoiseSchedule noise_schedule(const Shape & latent, double shift) const override {
        return NoiseSchedule::flow(shift > 0 ? shift : shift_.of(static_cast<double>(latent[0] * latent[1]) / 4));
    }

    ExtraInput extra_input() const override {
        const int64_t latent = vae_.latent_channels(), extra = input_channels() - latent;
        return extra == 0 ? ExtraInput::none : extra == latent ? ExtraInput::control : ExtraInput::fill;
    }

    bool takes_reference() const override { return flux_.c.guidance && extra_input() == ExtraInput::none; }

    int redux_size() const override { return redux_ ? static_cast<int>(redux_->vision.c.side()) : 0; }
    Value look_at(Graph & g) const override { return (*redux_)(g, g.input("image")); }

    int count_chunks(const Prompt &) const override { return 1; }
    int count_tokens(const std::string & text) const override {
        return static_cast<int>(t5_.count_tokens(text));
    }
    // CLIP's vector is of the beginning of a prompt alone, which is no loss: T5 reads the rest.
    std::string unread(const Prompt & prompt) const override { return t5_.unread(prompt, text_length()); }

    // The encoders run one after the other, so that their memory is not needed at once.
    void text(Graph & g, int) const override {
        if (g.has_input("ids")) {
            g.output("pooled", clip_.pooled(g, clip_(g, g.input_ids("ids"), 1), g.input_ids("ends")));
        }
        if (g.has_input("t5_ids")) {
            g.output("states", t5_(g));
        }
    }

    // clip_skip means nothing here: CLIP's vector is behind the last layer.
    Conditioning encode(Runner & runner, const Prompt & prompt, int clip_skip, int) const override {
        const ClipPrompt clip(bpe_, prompt, ClipBpe::end_token, 1);
        const TokenChunk tokens = t5_.tokens(prompt, text_length());
        const Tensor ids = clip.ids(), ends = clip.ends();
        auto outputs =
            runner.run("clip", {{"ids", &ids}, {"ends", &ends}}, [&](Graph & g) { text(g, clip_skip); });
        Tensor & pooled = outputs.at("pooled");
        Tensor states = t5_.encode(runner, tokens);
        emphasise(states.data.data(), t5_.width(), tokens, 0, t5_.width());
        pooled.ne[1] = 1; // of the first chunk, which begins the prompt
        pooled.data.resize(static_cast<size_t>(pooled.ne[0]));
        return {{{"text", std::move(states)}}, {{"pooled", std::move(pooled)}}};
    }

    Value denoise(Graph & g) const override {
        return flux_(g, g.input("latent"), g.input("time"), g.input("text"), g.input("pooled"),
                     flux_.c.guidance ? g.input("guidance") : nullptr,
                     g.has_input("reference") ? g.input("reference") : nullptr);
    }

    Value encode_image(Graph & g) const override { return vae_.encode(g, g.input("image")); }
    Value decode_latent(Graph & g) const override { return vae_.decode(g, g.input("latent")); }

  private:
    static std::string axes(const Checkpoint & file) {
        const auto stated = file.metadata().find("transformer.axes_dims_rope");
        return stated == file.metadata().end() ? "" : stated->second;
    }
    void check_fit(const Checkpoint & file) const;
    Defaults usual(const std::string & path) const;
    int64_t text_length() const { return flux_.c.guidance ? 512 : 256; } // tokens of T5

    ClipBpe bpe_;
    Flux flux_;
    Scope clip_scope_;
    ClipText clip_;
    T5Text t5_;
    Vae vae_;
    std::optional<Redux> redux_;
    FlowShift shift_{1};
    Defaults defaults_{};
};

// As the authors' programs and model cards have them.
Defaults Flux1::usual(const std::string & path) const {
    const bool plain = extra_input() == ExtraInput::none, fills = extra_input() == ExtraInput::fill;
    const float guidance = !flux_.c.guidance ? 0.0f : fills ? 30.0f : !plain ? 10.0f : is_kontext(path) ? 2.5f : 3.5f;
    const int steps = !flux_.c.guidance ? 4 : plain ? 28 : 50;
    return {steps, 1.0f, "euler", "simple", 1, guidance, fills ? 1.0f : 0.75f};
}

void Flux1::check_fit(const Checkpoint & file) const {
    const int64_t latent = vae_.latent_channels(), in = flux_.c.inputs / 4, out = flux_.c.outputs / 4;
    const int64_t side = vae_.reduction(), fill = 2 * latent + side * side;
    if (out != latent || (in != latent && in != 2 * latent && in != fill)) {
        fail(Status::unsupported,
             "%s: a transformer of %lld to %lld channels does not fit an autoencoder of %lld; "
             "FLUX has %lld (dev, schnell), %lld (Canny, Depth) or %lld (Fill) inputs for it",
             file.path().c_str(), static_cast<long long>(in), static_cast<long long>(out),
             static_cast<long long>(latent), static_cast<long long>(latent),
             static_cast<long long>(2 * latent), static_cast<long long>(fill));
    }
    if (clip_.c.width != flux_.c.pooled || t5_.width() != flux_.c.context) {
        fail(Status::unsupported,
             "%s: the transformer reads text %lld and %lld wide, but CLIP writes %lld and T5 %lld",
             file.path().c_str(), static_cast<long long>(flux_.c.pooled),
             static_cast<long long>(flux_.c.context), static_cast<long long>(clip_.c.width),
             static_cast<long long>(t5_.width()));
    }
    check_clip_tokens(file, clip_.c.vocabulary, clip_.c.positions);
}

// Its descendants (Chroma, FLUX.2) have the same blocks with other modulations: the checks of weights refuse
// them.
bool recognises(const Checkpoint & file) {
    return file.has("model.diffusion_model.single_blocks.0.linear1.weight") ||
           file.has("transformer.single_transformer_blocks.0.proj_mlp.weight");
}

} // namespace

extern const Family flux;
const Family flux = {
    "flux",
    recognises,
    [](WeightStore & weights, const OpenOptions & options) -> std::unique_ptr<Pipeline> {
        check_components(weights.checkpoint(), "FLUX.1",
                         {{"clip_l",
                           {"text_encoders.clip_l.transformer.text_model.embeddings.token_embedding.weight",
                            "text_encoder.text_model.embeddings.token_embedding.weight"}},
                          {"t5xxl",
                           {"text_encoders.t5xxl.transformer.encoder.final_layer_norm.weight",
                            "text_encoder_2.encoder.final_layer_norm.weight"}},
                          needed_vae()});
        return std::make_unique<Flux1>(weights, options);
    },
};

} // namespace sd
