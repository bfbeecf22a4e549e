// Stable Diffusion 1.x: CLIP-L, and a UNet with eight heads at every width.
#include "families/components.h"
#include "families/latent_diffusion.h"
#include "models/clip.h"

namespace sd {
namespace {

class StableDiffusion1 final : public LatentDiffusion {
  public:
    StableDiffusion1(WeightStore & weights, const OpenOptions & options)
        : LatentDiffusion(weights, options,
                          {"Stable Diffusion 1.x", {8, 0, false}, 0.18215f, false, {20, 7.0f, "dpm++2m", "karras", 1}}),
          text_scope_(weights.root("cond_stage_model.transformer", "text_encoder")),
          clip_(text_scope_, ClipConfig::read(text_scope_, true, false, "clip_l")) {
        const Checkpoint & file = weights.checkpoint();
        complete(weights, clip_.c.width, stated_prediction(file, options.prediction).value_or(Prediction::eps), 512);
        check_tokens(file, clip_.c.vocabulary, clip_.c.positions);
    }

    void text(Graph & g, int clip_skip) const override {
        g.output("states", clip_.norm(g, clip_(g, g.input_ids("ids"), clip_skip)));
    }

    Conditioning encode(Runner & runner, const Prompt & prompt, int clip_skip, int chunks) const override {
        check_clip_skip(clip_skip, 1, clip_.c.layers);
        return encode_alone(runner, prompt, ClipBpe::end_token, clip_skip, chunks);
    }

  private:
    std::vector<int64_t> text_widths() const override { return {clip_.c.width}; }

    Scope    text_scope_;
    ClipText clip_;
};

} // namespace

extern const Family sd1;
const Family        sd1 = {
    "sd1",
    [](const Checkpoint & file) { return unet_family(file) == UnetFamily::sd1; },
    [](WeightStore & weights, const OpenOptions & options) -> std::unique_ptr<Pipeline> {
        check_components(weights.checkpoint(), "Stable Diffusion 1.x",
                         {{"clip_l",
                           {"cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
                            "text_encoder.text_model.embeddings.token_embedding.weight"}},
                          needed_vae()});
        return std::make_unique<StableDiffusion1>(weights, options);
    },
};

} // namespace sd
