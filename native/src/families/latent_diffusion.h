// What Stable Diffusion 1.x, 2.x and XL have in common: CLIP's tokens, a UNet on the latents of a KL autoencoder,
// and a thousand scaled-linear noise levels (Rombach et al., 2022).
#pragma once

#include "families/clip_prompt.h"
#include "families/family.h"
#include "families/learned_words.h"
#include "models/unet.h"
#include "models/vae.h"

#include <initializer_list>
#include <optional>

namespace sd {

class LatentDiffusion : public Pipeline {
  public:
    Defaults      defaults() const override { return defaults_; }
    Prediction    prediction() const override { return prediction_; }
    LatentFormat  latent_format() const override { return {vae_.latent_channels(), vae_.reduction(), scale_}; }
    bool          is_zero_snr() const override { return zero_snr_; }
    NoiseSchedule noise_schedule(const Shape &, double) const override {
        return NoiseSchedule::scaled_linear(kind_.aligned(), zero_snr_);
    }
    int           input_channels() const override { return static_cast<int>(unet_.input_channels()); }
    int           size_multiple() const override { return vae_.reduction(); }
    int           native_size() const override { return native_size_; }

    int count_chunks(const Prompt & prompt) const override {
        return count_clip_chunks(bpe_, prompt, learned_.words());
    }
    int count_tokens(const std::string & text) const override {
        return sd::count_tokens(bpe_, text, learned_.words());
    }
    void learn(const std::vector<LearnedText> & words) override { learned_ = LearnedWords(bpe_, words, text_widths()); }

    Value denoise(Graph & g) const override {
        return unet_(g, g.input("latent"), g.input("time"), g.input("text"));
    }
    Value encode_image(Graph & g) const override { return vae_.encode(g, g.input("image")); }
    Value decode_latent(Graph & g) const override { return vae_.decode(g, g.input("latent")); }

  protected:
    struct Kind {
        const char * name; // in messages
        UnetKind     unet;
        float        scale;    // of latents, where the file does not tell
        bool         wide_vae; // its activations go beyond f16
        Defaults     defaults; // where the file's name does not tell of others
        const std::vector<float> & (*aligned)() = align_your_steps_sd1;
    };
    LatentDiffusion(WeightStore & weights, const OpenOptions & options, const Kind & kind);

    // At the end of construction: all weights are there, and the networks fit one another. `native_size` in
    // pixels holds where the file does not tell.
    void complete(WeightStore & weights, int64_t text_width, Prediction prediction, int native_size);

    // A prompt's conditioning by the only text encoder of a family.
    Conditioning encode_alone(Runner & runner, const Prompt & prompt, int32_t padding, int clip_skip, int chunks) const;

    // Of its text encoders.
    virtual std::vector<int64_t> text_widths() const = 0;

    ClipBpe      bpe_;
    Unet         unet_;
    LearnedWords learned_;

  private:
    void check_heads(const Checkpoint & file) const;
    bool read_zero_snr(const Checkpoint & file) const;

    Kind                kind_;
    Vae                 vae_;
    float               scale_;
    Defaults            defaults_;
    Prediction          prediction_ = Prediction::eps;
    std::optional<bool> asked_zero_snr_;
    bool                zero_snr_ = false;
    int        native_size_ = 0;
};

// What a file says of its output: an entry of its metadata, or an empty tensor called "v_pred".
std::optional<Prediction> stated_prediction(const Checkpoint & file, const std::string & asked);

// Which of these families a file is of, by its UNet: XL's takes a vector for the picture as a whole, and 1.x has
// proj_in as a convolution and not OpenCLIP's text encoder.
enum class UnetFamily { none, sd1, sd2, sdxl };
UnetFamily unet_family(const Checkpoint & file);

// Of such a UNet: a weight that reads the text, the one in its middle where that has one, and the one that reads XL's
// vector; null where there is none.
const StoredTensor * unet_text_input(const Checkpoint & file);
const StoredTensor * unet_vector_input(const Checkpoint & file);

// The first of the names that the file has; null where it has none.
const StoredTensor * find_any(const Checkpoint & file, std::initializer_list<const char *> names);

} // namespace sd
