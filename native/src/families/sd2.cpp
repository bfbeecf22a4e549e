// Stable Diffusion 2.x: OpenCLIP-H up to its last layer but one, and a UNet with heads of 64.
#include "families/components.h"
#include "families/latent_diffusion.h"
#include "models/clip.h"
#include "nn/dequantise.h"

#include <cmath>

namespace sd {
namespace {

constexpr int32_t padding = 0; // "!", which OpenCLIP fills up with

class StableDiffusion2 final : public LatentDiffusion {
  public:
    StableDiffusion2(WeightStore & weights, const OpenOptions & options)
        : LatentDiffusion(weights, options,
                          {"Stable Diffusion 2.x", {0, 64, false}, 0.18215f, false, {20, 7.0f, "dpm++2m", "karras", 2}}),
          text_scope_(weights.root("cond_stage_model.model", "text_encoder")),
          clip_(text_scope_, read_config(text_scope_)) {
        const Checkpoint &              file = weights.checkpoint();
        const std::optional<Prediction> stated = stated_prediction(file, options.prediction);
        const Prediction                prediction = stated ? *stated : guess_prediction(file);
        complete(weights, clip_.c.width, prediction, prediction == Prediction::v ? 768 : 512);
        check_tokens(file, clip_.c.vocabulary, clip_.c.positions);
    }

    // Layers are counted as in OpenCLIP's tower: 2 leaves the last one away, with which the model was trained.
    void text(Graph & g, int clip_skip) const override {
        g.output("states", clip_.norm(g, clip_(g, g.input_ids("ids"), clip_skip - 1)));
    }

    Conditioning encode(Runner & runner, const Prompt & prompt, int clip_skip, int chunks) const override {
        check_clip_skip(clip_skip, 2, clip_.c.layers + 1);
        return encode_alone(runner, prompt, padding, clip_skip, chunks);
    }

  private:
    std::vector<int64_t> text_widths() const override { return {clip_.c.width}; }

    // diffusers folders come without the last layer, which nothing uses.
    static ClipConfig read_config(const Scope & scope) {
        ClipConfig config = ClipConfig::read(scope, false, true, "clip_h");
        const bool in_folder = scope.at("", "text_model.embeddings.token_embedding").find() != nullptr;
        config.layers -= in_folder ? 0 : 1;
        return config;
    }

    static Prediction guess_prediction(const Checkpoint & file);

    Scope    text_scope_;
    ClipText clip_;
};

// Single files do not say whether they predict v. ComfyUI found out that it shows in the spread of one bias; that
// networks for inpainting all predict eps is known.
Prediction StableDiffusion2::guess_prediction(const Checkpoint & file) {
    const StoredTensor * bias = find_any(
        file, {"model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias",
               "unet.up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"});
    const StoredTensor * input =
        find_any(file, {"model.diffusion_model.input_blocks.0.0.weight", "unet.conv_in.weight"});
    if (!bias || bias->dims != 1 || !input || input->ne[2] != 4) {
        return Prediction::eps;
    }
    std::vector<float> values(static_cast<size_t>(count(bias->ne)));
    dequantise(*bias, values.data());
    double sum = 0, squares = 0;
    for (const float value : values) {
        sum += value;
        squares += static_cast<double>(value) * value;
    }
    const double n = static_cast<double>(values.size());
    return std::sqrt(squares / n - sum / n * (sum / n)) > 0.09 ? Prediction::v : Prediction::eps;
}

} // namespace

extern const Family sd2;
const Family        sd2 = {
    "sd2",
    [](const Checkpoint & file) { return unet_family(file) == UnetFamily::sd2; },
    [](WeightStore & weights, const OpenOptions & options) -> std::unique_ptr<Pipeline> {
        check_components(weights.checkpoint(), "Stable Diffusion 2.x",
                         {{"clip_h",
                           {"cond_stage_model.model.token_embedding.weight",
                            "text_encoder.text_model.embeddings.token_embedding.weight"}},
                          needed_vae()});
        return std::make_unique<StableDiffusion2>(weights, options);
    },
};

} // namespace sd
