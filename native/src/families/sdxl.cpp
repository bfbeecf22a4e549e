// Stable Diffusion XL: CLIP-L and OpenCLIP-bigG side by side, and a UNet that is told the size of the picture
// (Podell et al., 2023, "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis").
#include "core/error.h"
#include "families/components.h"
#include "families/distilled.h"
#include "families/latent_diffusion.h"
#include "models/clip.h"

#include <algorithm>

namespace sd {
namespace {

constexpr int     sizes = 6; // height and width that the picture had, its crop's top and left, height and width now
constexpr int64_t size_width = 256;
constexpr int32_t padding_g = 0; // "!", which OpenCLIP fills up with; CLIP-L repeats its end token

class StableDiffusionXl final : public LatentDiffusion {
  public:
    StableDiffusionXl(WeightStore & weights, const OpenOptions & options)
        : LatentDiffusion(weights, options,
                          {"Stable Diffusion XL", {0, 64, true}, 0.13025f, needs_wide_vae(weights.checkpoint()),
                           {30, 6.0f, "dpm++2m", "karras", 2}, align_your_steps_sdxl}),
          scope_l_(weights.root("conditioner.embedders.0.transformer", "text_encoder")),
          scope_g_(weights.root("conditioner.embedders.1.model", "text_encoder_2")),
          clip_l_(scope_l_, ClipConfig::read(scope_l_, true, false, "clip_l")),
          clip_g_(scope_g_, ClipConfig::read(scope_g_, false, true, "clip_g")),
          projection_(scope_g_.at("text_projection")
                          .turned({clip_g_.c.width, unet_.vector_width() - sizes * size_width, 1, 1})) {
        const Checkpoint & file = weights.checkpoint();
        complete(weights, clip_l_.c.width + clip_g_.c.width,
                 stated_prediction(file, options.prediction).value_or(Prediction::eps),
                 is_sdxl_turbo(file.path()) ? 512 : 1024);
        check_clip_tokens(file, clip_l_.c.vocabulary, clip_l_.c.positions);
        check_clip_tokens(file, clip_g_.c.vocabulary, clip_g_.c.positions);
    }

    void text(Graph & g, int clip_skip) const override {
        const Value l = clip_l_(g, g.input_ids("ids"), clip_skip);
        const Value second = clip_g_(g, g.input_ids("ids_2"), clip_skip, "_2");
        g.output("states", g.concat_features(l, second));
        const Value pooled = clip_g_.pooled(g, clip_g_.finish(g, second, clip_skip), g.input_ids("ends"));
        g.output("pooled", g.linear(projection_, nullptr, pooled));
    }

    Conditioning encode(Runner & runner, const Prompt & prompt, int clip_skip, int chunks) const override {
        check_clip_skip(clip_skip, 1, std::min(clip_l_.c.layers, clip_g_.c.layers));
        const ClipPrompt    l(bpe_, prompt, ClipBpe::end_token, chunks, learned_.words());
        const ClipPrompt    second(bpe_, prompt, padding_g, chunks, learned_.words());
        const LearnedInputs learned(l.chunks, learned_, 0), learned_2(second.chunks, learned_, 1);
        const Tensor        ids = l.ids(), ids_2 = second.ids(), ends = second.ends();
        Inputs              inputs{{"ids", &ids}, {"ids_2", &ids_2}, {"ends", &ends}};
        learned.add_to(inputs);
        learned_2.add_to(inputs, "_2");
        auto outputs = runner.run("text" + std::to_string(clip_skip), inputs, [&](Graph & g) { text(g, clip_skip); });
        Tensor & states = outputs.at("states");
        l.emphasise(states, 0, clip_l_.c.width);
        second.emphasise(states, clip_l_.c.width, clip_g_.c.width);
        Tensor pooled = std::move(outputs.at("pooled")); // of the first chunk, which begins the prompt
        pooled.ne[1] = 1;
        pooled.data.resize(static_cast<size_t>(pooled.ne[0]));
        return {{{"text", join_chunks(std::move(states))}}, {{"pooled", std::move(pooled)}}};
    }

    bool takes_sizes() const override { return true; }

    Conditioning describe(const PictureSizes & s) const override {
        Tensor told({sizes, 1, 1, 1});
        told.data.clear();
        for (const int pixels : {s.original_height, s.original_width, s.crop_top, s.crop_left, s.target_height, s.target_width}) {
            told.data.push_back(static_cast<float>(pixels));
        }
        return {{}, {{"sizes", std::move(told)}}};
    }

    Value denoise(Graph & g) const override {
        const Value told = g.input("sizes"), pooled = g.input("pooled");
        const Value waves = g.timestep_embedding(g.flatten(told, Graph::shape(told)[1]), size_width);
        return unet_(g, g.input("latent"), g.input("time"), g.input("text"),
                     g.concat_features(pooled, g.flatten(waves, sizes)));
    }

  private:
    std::vector<int64_t> text_widths() const override { return {clip_l_.c.width, clip_g_.c.width}; }

    // The activations of its autoencoder go beyond f16, and pictures become black. diffusers folders tell where it
    // is one that was changed so that they do not.
    static bool needs_wide_vae(const Checkpoint & file) {
        const auto stated = file.metadata().find("vae.force_upcast");
        return stated == file.metadata().end() || stated->second != "false";
    }

    Scope          scope_l_, scope_g_;
    ClipText       clip_l_, clip_g_;
    const Weight * projection_;
};

// Networks of the same structure that are something else.
void refuse_relatives(const Checkpoint & file) {
    const StoredTensor * text = unet_text_input(file);
    const StoredTensor * vector = unet_vector_input(file);
    const char * path = file.path().c_str();
    if (text->ne[0] + 5 * size_width == vector->ne[0]) { // bigG alone, and a score in the place of the last size
        fail(Status::unsupported,
             "%s: is SDXL's refiner, which only finishes what the base model began and is not supported; open the "
             "base model, and for more detail use its own image-to-image",
             path);
    }
    const auto mean = file.metadata().find("vae.latents_mean");
    if (find_any(file, {"edm_mean", "edm_vpred.sigma_max"}) ||
        (mean != file.metadata().end() && !mean->second.empty())) {
        fail(Status::unsupported,
             "%s: is an SDXL that was trained on other noise levels (EDM, as Playground 2.5 and CosXL), which is not "
             "supported",
             path);
    }
}

} // namespace

extern const Family sdxl;
const Family        sdxl = {
    "sdxl",
    [](const Checkpoint & file) { return unet_family(file) == UnetFamily::sdxl; },
    [](WeightStore & weights, const OpenOptions & options) -> std::unique_ptr<Pipeline> {
        refuse_relatives(weights.checkpoint());
        check_components(weights.checkpoint(), "Stable Diffusion XL",
                         {{"clip_l",
                           {"conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight",
                            "text_encoder.text_model.embeddings.token_embedding.weight"}},
                          {"clip_g",
                           {"conditioner.embedders.1.model.token_embedding.weight",
                            "text_encoder_2.text_model.embeddings.token_embedding.weight"}},
                          needed_vae()});
        return std::make_unique<StableDiffusionXl>(weights, options);
    },
};

} // namespace sd
