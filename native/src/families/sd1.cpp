// Stable Diffusion 1.x: CLIP-L, a UNet with eight heads at every width, and the KL autoencoder
// (Rombach et al., 2022, "High-Resolution Image Synthesis with Latent Diffusion Models").
#include "core/error.h"
#include "families/family.h"
#include "models/clip.h"
#include "models/unet.h"
#include "models/vae.h"

#include <algorithm>
#include <cstdlib>

namespace sd {
namespace {

constexpr int heads = 8;

class StableDiffusion1 final : public Pipeline {
  public:
    StableDiffusion1(WeightStore & weights, const OpenOptions & options)
        : bpe_(options.data_dir + "/clip_merges.txt"),
          unet_(weights.root("model.diffusion_model", "unet"), {heads, 0}),
          text_scope_(weights.root("cond_stage_model.transformer.text_model", "text_encoder.text_model")),
          clip_(text_scope_, ClipConfig::read(text_scope_, true)),
          vae_(weights.root("first_stage_model", "vae")),
          prediction_(read_prediction(weights.checkpoint(), options.prediction)),
          native_size_(read_native_size(weights.checkpoint(), vae_.reduction())) {
        weights.check();
        weights.check_all_used({"model.diffusion_model", "unet"});
        check_fit(weights.checkpoint());
    }

    Defaults      defaults() const override { return {20, 7.0f, "dpm++2m", "karras", 1}; }
    Prediction    prediction() const override { return prediction_; }
    LatentFormat  latent_format() const override { return {vae_.latent_channels(), vae_.reduction(), 0.18215f}; }
    NoiseSchedule noise_schedule(const Shape &, double) const override { return NoiseSchedule::scaled_linear(); }
    int           input_channels() const override { return static_cast<int>(unet_.input_channels()); }
    int           size_multiple() const override { return vae_.reduction(); }
    int           native_size() const override { return native_size_; }

    int count_chunks(const Prompt & prompt) const override {
        return static_cast<int>(chunk_tokens(bpe_, prompt, ClipBpe::end_token).size());
    }

    int count_tokens(const std::string & text) const override { return static_cast<int>(bpe_.encode(text).size()); }

    Conditioning encode(Runner & runner, const Prompt & prompt, int clip_skip, int chunks) const override;

    Value text(Graph & g, int clip_skip) const override { return clip_(g, g.input_ids("ids"), clip_skip); }

    Value denoise(Graph & g) const override {
        return unet_(g, g.input("latent"), g.input("time"), g.input("text"));
    }

    Value encode_image(Graph & g) const override { return vae_.encode(g, g.input("image")); }
    Value decode_latent(Graph & g) const override { return vae_.decode(g, g.input("latent")); }

  private:
    static Prediction read_prediction(const Checkpoint & file, const std::string & asked);
    static int        read_native_size(const Checkpoint & file, int reduction);
    void              check_fit(const Checkpoint & file) const;

    ClipBpe    bpe_;
    Unet       unet_;
    Scope      text_scope_;
    ClipText   clip_;
    Vae        vae_;
    Prediction prediction_;
    int        native_size_;
};

// A file states v-prediction by an entry of its metadata or by an empty tensor called "v_pred"; else it is eps.
Prediction StableDiffusion1::read_prediction(const Checkpoint & file, const std::string & asked) {
    const auto        stated = file.metadata().find("prediction_type");
    const std::string name = !asked.empty()                     ? asked
                             : file.has("v_pred")               ? "v"
                             : stated == file.metadata().end()  ? "eps"
                             : stated->second == "v_prediction" ? "v"
                             : stated->second == "epsilon"      ? "eps"
                                                                : stated->second;
    if (name != "eps" && name != "v") {
        fail(asked.empty() ? Status::unsupported : Status::bad_argument,
             "%s: prediction '%s' is not known; there are: eps, v", file.path().c_str(), name.c_str());
    }
    return name == "v" ? Prediction::v : Prediction::eps;
}

// diffusers folders state the latent's side; 512 pixels is what Stable Diffusion 1.x was trained at.
int StableDiffusion1::read_native_size(const Checkpoint & file, int reduction) {
    const auto stated = file.metadata().find("unet.sample_size");
    const int  cells = stated == file.metadata().end() ? 0 : std::atoi(stated->second.c_str());
    return cells > 0 && cells <= 1024 ? cells * reduction : 512;
}

void StableDiffusion1::check_fit(const Checkpoint & file) const {
    const int64_t latent = vae_.latent_channels(), in = unet_.input_channels();
    if (unet_.context_width() != clip_.c.width) {
        fail(Status::unsupported, "%s: the UNet reads text %lld wide, but the text encoder writes %lld",
             file.path().c_str(), static_cast<long long>(unet_.context_width()), static_cast<long long>(clip_.c.width));
    }
    if (unet_.output_channels() != latent || (in != latent && in != 2 * latent && in != 2 * latent + 1)) {
        fail(Status::unsupported, "%s: a UNet of %lld to %lld channels does not fit an autoencoder of %lld",
             file.path().c_str(), static_cast<long long>(in), static_cast<long long>(unet_.output_channels()),
             static_cast<long long>(latent));
    }
    if (clip_.c.vocabulary <= ClipBpe::end_token || clip_.c.positions < 77) {
        fail(Status::unsupported, "%s: a text encoder of %lld tokens and %lld positions is not CLIP's (49408 and 77)",
             file.path().c_str(), static_cast<long long>(clip_.c.vocabulary), static_cast<long long>(clip_.c.positions));
    }
    const auto stated = file.metadata().find("unet.attention_head_dim"); // diffusers' misnomer for the number of heads
    if (stated != file.metadata().end() && stated->second != std::to_string(heads)) {
        fail(Status::unsupported, "%s: its UNet has attention_head_dim %s; Stable Diffusion 1.x has %d heads",
             file.path().c_str(), stated->second.c_str(), heads);
    }
}

// Each token's state is multiplied by its weight, then the chunk is scaled back to the mean that it had, as
// stable-diffusion-webui does, so that emphasis does not change the conditioning as a whole.
void emphasise(float * states, const TokenChunk & chunk, int64_t width) {
    const int64_t n = static_cast<int64_t>(chunk.ids.size());
    double        before = 0, after = 0;
    for (int64_t i = 0; i < n * width; ++i) {
        before += states[i];
        states[i] *= chunk.weights[i / width];
        after += states[i];
    }
    const bool plain = std::all_of(chunk.weights.begin(), chunk.weights.end(), [](float w) { return w == 1.0f; });
    if (plain || after == 0) {
        return;
    }
    const float back = static_cast<float>(before / after);
    for (int64_t i = 0; i < n * width; ++i) {
        states[i] *= back;
    }
}

Conditioning StableDiffusion1::encode(Runner & runner, const Prompt & prompt, int clip_skip, int chunks) const {
    if (clip_skip < 1 || clip_skip > clip_.c.layers) {
        fail(Status::bad_argument, "clip_skip %d: must be between 1 and the text encoder's %lld layers", clip_skip,
             static_cast<long long>(clip_.c.layers));
    }
    std::vector<TokenChunk> parts = chunk_tokens(bpe_, prompt, ClipBpe::end_token);
    while (static_cast<int>(parts.size()) < chunks) {
        parts.push_back(chunk_tokens(bpe_, {}, ClipBpe::end_token).front());
    }
    const int64_t n = static_cast<int64_t>(parts.front().ids.size());
    const int64_t total = static_cast<int64_t>(parts.size());
    Tensor        ids({n, total, 1, 1});
    for (int64_t i = 0; i < total; ++i) {
        std::copy(parts[i].ids.begin(), parts[i].ids.end(), ids.data.begin() + i * n);
    }
    auto outputs = runner.run("text" + std::to_string(clip_skip), {{"ids", &ids}},
                              [&](Graph & g) { g.output("states", text(g, clip_skip)); });
    Tensor states = std::move(outputs.at("states"));
    for (int64_t i = 0; i < total; ++i) {
        emphasise(states.data.data() + i * n * clip_.c.width, parts[i], clip_.c.width);
    }
    states.ne = {clip_.c.width, n * total, 1, 1};
    Conditioning conditioning;
    conditioning.emplace("text", std::move(states));
    return conditioning;
}

// SD 1.x by its UNet, whose text side is not OpenCLIP's: in single files the text encoder tells, in bare
// UNets the convolution proj_in.
bool recognises(const Checkpoint & file) {
    const StoredTensor * single = file.find("model.diffusion_model.middle_block.1.proj_in.weight");
    const StoredTensor * folder = file.find("unet.mid_block.attentions.0.proj_in.weight");
    const StoredTensor * proj_in = single ? single : folder;
    return proj_in && proj_in->dims == 4;
}

} // namespace

extern const Family sd1;
const Family        sd1 = {
    "sd1",
    recognises,
    [](WeightStore & weights, const OpenOptions & options) -> std::unique_ptr<Pipeline> {
        return std::make_unique<StableDiffusion1>(weights, options);
    },
};

} // namespace sd
