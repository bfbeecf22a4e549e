// FLUX.1 (Black Forest Labs, 2024): CLIP-L's one vector and T5's tokens, a transformer that was distilled to take its
// guidance as an input (dev, Fill, Canny, Depth) or to need none (schnell), and an autoencoder of 16 channels.
#include "core/error.h"
#include "families/family.h"
#include "models/clip.h"
#include "models/flux.h"
#include "models/vae.h"

namespace sd {
namespace {

class Flux1 final : public Pipeline {
  public:
    Flux1(WeightStore & weights, const OpenOptions & options)
        : bpe_(options.data_dir + "/clip_merges.txt"),
          flux_(weights.root("model.diffusion_model", "transformer"), axes(weights.checkpoint())),
          vae_(weights.root("first_stage_model", "vae")) {
        weights.check();
        weights.check_all_used({"model.diffusion_model", "transformer"});
        check_fit(weights.checkpoint());
    }

    Defaults defaults() const override {
        const bool  conditioned = extra_input() != ExtraInput::none;
        const float guidance = !flux_.c.guidance ? 0.0f : extra_input() == ExtraInput::fill ? 30.0f : conditioned ? 10.0f : 3.5f;
        return {!flux_.c.guidance ? 4 : conditioned ? 50 : 28, 1.0f, "euler", "simple", 1, guidance};
    }

    Prediction   prediction() const override { return Prediction::flow; }
    LatentFormat latent_format() const override { return {vae_.latent_channels(), vae_.reduction(), 0.3611f, 0.1159f}; }
    int          input_channels() const override { return static_cast<int>(flux_.c.inputs / 4); }
    int          size_multiple() const override { return 2 * vae_.reduction(); }
    int          native_size() const override { return 1024; }

    // schnell was trained without a shift.
    NoiseSchedule noise_schedule(const Shape & latent, double shift) const override {
        const double own = flux_.c.guidance ? dynamic_shift(static_cast<double>(latent[0] * latent[1]) / 4) : 1;
        return NoiseSchedule::flow(shift > 0 ? shift : own);
    }

    ExtraInput extra_input() const override {
        const int64_t latent = vae_.latent_channels(), extra = input_channels() - latent;
        return extra == 0 ? ExtraInput::none : extra == latent ? ExtraInput::control : ExtraInput::fill;
    }

    int count_chunks(const Prompt &) const override { return 1; }
    int count_tokens(const std::string & text) const override { return static_cast<int>(bpe_.encode(text).size()); }

    Conditioning encode(Runner &, const Prompt &, int, int) const override {
        fail(Status::unsupported, "text of FLUX cannot be encoded yet");
    }

    Value text(Graph &, int) const override { fail(Status::unsupported, "text of FLUX cannot be encoded yet"); }

    Value denoise(Graph & g) const override {
        return flux_(g, g.input("latent"), g.input("time"), g.input("text"), g.side_by_side(g.input("pooled")),
                     flux_.c.guidance ? g.input("guidance") : nullptr);
    }

    Value encode_image(Graph & g) const override { return vae_.encode(g, g.input("image")); }
    Value decode_latent(Graph & g) const override { return vae_.decode(g, g.input("latent")); }

  private:
    static std::string axes(const Checkpoint & file) {
        const auto stated = file.metadata().find("transformer.axes_dims_rope");
        return stated == file.metadata().end() ? "" : stated->second;
    }
    void check_fit(const Checkpoint & file) const;

    ClipBpe bpe_;
    Flux    flux_;
    Vae     vae_;
};

void Flux1::check_fit(const Checkpoint & file) const {
    const int64_t latent = vae_.latent_channels(), in = flux_.c.inputs / 4, out = flux_.c.outputs / 4;
    const int64_t side = vae_.reduction(), fill = 2 * latent + side * side;
    if (out != latent || (in != latent && in != 2 * latent && in != fill)) {
        fail(Status::unsupported, "%s: a transformer of %lld to %lld channels does not fit an autoencoder of %lld; "
             "FLUX has %lld (dev, schnell), %lld (Canny, Depth) or %lld (Fill) inputs for it", file.path().c_str(),
             static_cast<long long>(in), static_cast<long long>(out), static_cast<long long>(latent),
             static_cast<long long>(latent), static_cast<long long>(2 * latent), static_cast<long long>(fill));
    }
}

// Chroma and other descendants lack or have other modulations, and are told apart by the checks of weights.
bool recognises(const Checkpoint & file) {
    return file.has("model.diffusion_model.single_blocks.0.linear1.weight") ||
           file.has("transformer.single_transformer_blocks.0.proj_mlp.weight");
}

} // namespace

extern const Family flux;
const Family        flux = {
    "flux",
    recognises,
    [](WeightStore & weights, const OpenOptions & options) -> std::unique_ptr<Pipeline> {
        return std::make_unique<Flux1>(weights, options);
    },
};

} // namespace sd
