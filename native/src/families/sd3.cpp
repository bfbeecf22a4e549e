// Stable Diffusion 3 and 3.5: up to three text encoders, CLIP-L, CLIP-G and T5, of which any may be left out;
// the multimodal transformer; and an autoencoder of 16 channels (Esser et al., 2024).
#include "core/error.h"
#include "families/clip_prompt.h"
#include "families/components.h"
#include "families/distilled.h"
#include "families/family.h"
#include "families/flow_shift.h"
#include "families/t5_text.h"
#include "models/clip.h"
#include "models/mmdit.h"
#include "models/vae.h"

#include <algorithm>
#include <optional>

namespace sd {
namespace {

constexpr int32_t padding_g = 0;   // "!", which OpenCLIP fills up with
constexpr int64_t t5_tokens = 256; // that the model was trained with

// A CLIP and the matrix behind its pooled vector, which some files leave out where it is CLIP-L's.
struct Clip {
    Scope here;
    ClipText text;

    std::optional<Linear> projection = declare();

    int64_t width() const { return text.c.width; }
    int64_t pooled_width() const { return projection ? projection->out : width(); }

    // The one vector behind all layers, from the states after all but the last `skip - 1`.
    Value pooled(Graph & g, Value states, int skip) const {
        Value out = text.pooled(g, text.finish(g, states, skip), g.input_ids("ends"));
        return projection ? (*projection)(g, out) : out;
    }

  private:
    std::optional<Linear> declare() const {
        const Scope at = here.at("text_projection");
        const StoredTensor * stored = at.find();
        if (!stored) {
            return std::nullopt;
        }
        return Linear{at, text.c.width, stored->ne[1], false};
    }
};

class StableDiffusion3 final : public Pipeline {
  public:
    StableDiffusion3(WeightStore & weights, const OpenOptions & options)
        : bpe_(options.data_dir + "/clip_merges.txt"),
          mmdit_(weights.root("model.diffusion_model", "transformer")),
          clip_l_(
              open_clip(weights.root("text_encoders.clip_l.transformer", "text_encoder"), true, "clip_l")),
          clip_g_(
              open_clip(weights.root("text_encoders.clip_g.transformer", "text_encoder_2"), false, "clip_g")),
          vae_(weights.root("first_stage_model", "vae")) {
        const Scope t5 = weights.root("text_encoders.t5xxl.transformer", "text_encoder_3");
        if (t5.at("encoder.final_layer_norm").has()) {
            t5_.emplace(weights.checkpoint(), t5, options.data_dir);
        }
        weights.check();
        weights.check_all_used({"model.diffusion_model", "transformer"});
        check_fit(weights.checkpoint());
        shift_ = FlowShift::read(weights.checkpoint(), {3});
        // Both CLIPs were trained with their last layer but one.
        const Defaults usual{28, mmdit_.c.hidden > 1536 ? 4.5f : 7.0f, "euler", "normal", 2};
        defaults_ = distilled_flow(weights.checkpoint().path(), usual, 4);
    }

    Defaults defaults() const override { return defaults_; }
    Prediction prediction() const override { return Prediction::flow; }
    LatentFormat latent_format() const override {
        return {vae_.latent_channels(), vae_.reduction(), 1.5305f, 0.0609f};
    }
    int input_channels() const override { return static_cast<int>(mmdit_.c.channels); }
    int size_multiple() const override { return 2 * vae_.reduction(); }
    int native_size() const override { return 1024; }

    NoiseSchedule noise_schedule(const Shape & latent, double shift) const override {
        const double own = shift_.of(static_cast<double>(latent[0] * latent[1]) / 4);
        return shift > 0 ? NoiseSchedule::flow(shift) : NoiseSchedule::flow(own, shift_.grows);
    }

    int count_chunks(const Prompt & prompt) const override { return count_clip_chunks(bpe_, prompt); }
    int count_tokens(const std::string & text) const override {
        return static_cast<int>(bpe_.encode(text).size());
    }
    std::string unread(const Prompt & prompt) const override {
        const std::string cut = t5_ ? t5_->unread(prompt, t5_tokens) : "";
        return cut.empty() || !(clip_l_ || clip_g_) ? cut : cut + ", which CLIP alone reads";
    }

    void text(Graph & g, int clip_skip) const override;
    Conditioning encode(Runner & runner, const Prompt & prompt, int clip_skip, int chunks) const override;

    Value denoise(Graph & g) const override {
        return mmdit_(g, g.input("latent"), g.input("time"), g.input("text"), g.input("pooled"));
    }

    Value encode_image(Graph & g) const override { return vae_.encode(g, g.input("image")); }
    Value decode_latent(Graph & g) const override { return vae_.decode(g, g.input("latent")); }

  private:
    static std::optional<Clip> open_clip(const Scope & here, bool quick, const char * argument);
    void check_fit(const Checkpoint & file) const;

    // A CLIP's part of the conditioning: at `feature` of the tokens, and of the vector.
    void add_clip(Runner & runner, const Clip & clip, const char * name, const ClipPrompt & prompt,
                  int clip_skip, int64_t feature, Tensor & tokens, int64_t pooled_feature,
                  Tensor & pooled) const;

    ClipBpe bpe_;
    Mmdit mmdit_;
    std::optional<Clip> clip_l_, clip_g_;
    std::optional<T5Text> t5_;
    Vae vae_;
    FlowShift shift_{3};
    Defaults defaults_{};
};

std::optional<Clip> StableDiffusion3::open_clip(const Scope & here, bool quick, const char * argument) {
    if (!here.at("text_model.embeddings.token_embedding").has()) {
        return std::nullopt;
    }
    return Clip{here, ClipText(here, ClipConfig::read(here, quick, false, argument))};
}

void StableDiffusion3::check_fit(const Checkpoint & file) const {
    const int64_t latent = vae_.latent_channels(), out = mmdit_.c.outputs / 4;
    if (mmdit_.c.channels != latent || out != latent) {
        fail(Status::unsupported,
             "%s: a transformer of %lld to %lld channels does not fit an autoencoder of %lld",
             file.path().c_str(), static_cast<long long>(mmdit_.c.channels), static_cast<long long>(out),
             static_cast<long long>(latent));
    }
    int64_t width = 0, pooled = 0;
    for (const std::optional<Clip> * clip : {&clip_l_, &clip_g_}) {
        if (*clip) {
            width += (*clip)->width();
            pooled += (*clip)->pooled_width();
            check_clip_tokens(file, (*clip)->text.c.vocabulary, (*clip)->text.c.positions);
        }
    }
    if (width > mmdit_.c.context || pooled > mmdit_.c.pooled ||
        (clip_l_ && clip_g_ && pooled != mmdit_.c.pooled) || (t5_ && t5_->width() != mmdit_.c.context)) {
        fail(Status::unsupported,
             "%s: the transformer reads text %lld and %lld wide, which CLIPs of %lld and %lld and a T5 of "
             "%lld do not write",
             file.path().c_str(), static_cast<long long>(mmdit_.c.context),
             static_cast<long long>(mmdit_.c.pooled), static_cast<long long>(width),
             static_cast<long long>(pooled), static_cast<long long>(t5_ ? t5_->width() : 0));
    }
    if (!clip_l_ && !clip_g_ && !t5_) {
        check_components(file, "Stable Diffusion 3", {{"clip_l", {}}, {"clip_g", {}}, {"t5xxl", {}}});
    }
}

// ---- text ----------------------------------------------------------------------------------------------

// The encoders run one after the other, so that their memory is not needed at once. Inputs: "ids" for CLIP-L
// or "ids_2" for CLIP-G, with "ends"; or T5's.
void StableDiffusion3::text(Graph & g, int clip_skip) const {
    if (g.has_input("t5_ids")) {
        if (!t5_) {
            fail(Status::bad_argument, "this model has no T5");
        }
        g.output("states", (*t5_)(g));
        return;
    }
    const bool is_g = g.has_input("ids_2");
    const std::optional<Clip> & clip = is_g ? clip_g_ : clip_l_;
    if (!clip) {
        fail(Status::bad_argument, "this model has no CLIP-%s", is_g ? "G" : "L");
    }
    const Value states = clip->text(g, g.input_ids(is_g ? "ids_2" : "ids"), clip_skip);
    g.output("states", states);
    g.output("pooled", clip->pooled(g, states, clip_skip));
}

void StableDiffusion3::add_clip(Runner & runner, const Clip & clip, const char * name,
                                const ClipPrompt & prompt, int clip_skip, int64_t feature, Tensor & tokens,
                                int64_t pooled_feature, Tensor & pooled) const {
    check_clip_skip(clip_skip, 1, clip.text.c.layers);
    const Tensor ids = prompt.ids(), ends = prompt.ends();
    auto outputs = runner.run(name + std::to_string(clip_skip), {{name, &ids}, {"ends", &ends}},
                              [&](Graph & g) { text(g, clip_skip); });
    Tensor & states = outputs.at("states");
    prompt.emphasise(states, 0, clip.width());
    const float * from = states.data.data();
    for (int64_t token = 0; token < tokens.ne[1]; ++token, from += clip.width()) {
        std::copy_n(from, clip.width(), tokens.data.begin() + token * tokens.ne[0] + feature);
    }
    // Of the first chunk, which begins the prompt.
    std::copy_n(outputs.at("pooled").data.begin(), clip.pooled_width(), pooled.data.begin() + pooled_feature);
}

// CLIP-L's and CLIP-G's tokens side by side, zeros up to T5's width, and T5's tokens behind them. What is
// left out is zero, T5's tokens too.
Conditioning StableDiffusion3::encode(Runner & runner, const Prompt & prompt, int clip_skip,
                                      int chunks) const {
    const ClipPrompt l(bpe_, prompt, ClipBpe::end_token, chunks), second(bpe_, prompt, padding_g, chunks);
    Tensor tokens({mmdit_.c.context, 77 * static_cast<int64_t>(l.chunks.size()), 1, 1});
    Tensor pooled({mmdit_.c.pooled, 1, 1, 1});
    if (clip_l_) {
        add_clip(runner, *clip_l_, "ids", l, clip_skip, 0, tokens, 0, pooled);
    }
    if (clip_g_) { // behind CLIP-L, or where it would be
        const int64_t first = mmdit_.c.pooled - clip_g_->pooled_width();
        add_clip(runner, *clip_g_, "ids_2", second, clip_skip, clip_l_ ? clip_l_->width() : first, tokens,
                 first, pooled);
    }
    Tensor of_t5({mmdit_.c.context, t5_tokens, 1, 1});
    if (t5_) {
        const TokenChunk chunk = t5_->tokens(prompt, t5_tokens);
        of_t5 = t5_->encode(runner, chunk);
        emphasise(of_t5.data.data(), mmdit_.c.context, chunk, 0, mmdit_.c.context);
    }
    tokens.ne[1] += t5_tokens;
    tokens.data.insert(tokens.data.end(), of_t5.data.begin(), of_t5.data.end());
    return {{{"text", std::move(tokens)}}, {{"pooled", std::move(pooled)}}};
}

bool recognises(const Checkpoint & file) {
    return file.has("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight") ||
           file.has("transformer.transformer_blocks.0.norm1_context.linear.weight");
}

} // namespace

extern const Family sd3;
const Family sd3 = {
    "sd3",
    recognises,
    [](WeightStore & weights, const OpenOptions & options) -> std::unique_ptr<Pipeline> {
        check_components(weights.checkpoint(), "Stable Diffusion 3", {needed_vae()});
        return std::make_unique<StableDiffusion3>(weights, options);
    },
};

} // namespace sd
