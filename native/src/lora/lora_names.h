// Every spelling of every weight of a model, built once from the declared weights. Names are looked up whole,
// as nothing tells where an underscore was a dot.
#pragma once

#include "lora/lora_module.h"
#include "nn/weights.h"

#include <deque>
#include <string>
#include <unordered_map>
#include <vector>

namespace sd {

class LoraNames {
  public:
    // The weights have to outlive this. Names that two weights would share are an Error(internal).
    explicit LoraNames(const std::deque<Weight> & weights);
    explicit LoraNames(const WeightStore & weights) : LoraNames(weights.weights()) {}

    // The targets that a stem means under its leaf ("weight" or "bias"); empty where it means none.
    std::vector<LoraTarget> find(const std::string & stem, const std::string & leaf) const;

    // Whether a stem that means nothing here belongs to a component that this model lacks.
    bool lacks_component(const std::string & stem) const;

    // Whether a stem is spelled as a module of the denoiser.
    static bool is_denoiser_stem(const std::string & stem);

    size_t size() const { return targets_.size(); }

  private:
    // A network, as the prefixes of stems tell them apart. SD 2's only encoder and CLIP-L share a place.
    enum Component { denoiser, clip, clip_2, t5, components };

    struct Prefix;
    static const std::vector<Prefix> & prefixes();

    void               add(const Weight & weight);
    void               add_path(Component component, const std::string & path, const LoraTarget & target);
    void               add_module(Component component, const std::string & module, char leaf,
                                  const LoraTarget & target);
    void               put(const std::string & key, const LoraTarget & target);
    const LoraTarget * look_up(const std::string & stem, char leaf) const;

    std::unordered_map<std::string, LoraTarget> targets_;
    bool                                        has_[components] = {};
};

// The text encoders that may have multipliers of their own, as kohya's files number them: te1, te2, te3.
enum TextEncoder { first_encoder /* CLIP-L, or the only one */, clip_g_encoder, t5_encoder, text_encoders };

// The text encoder that a weight belongs to; -1 for the denoiser and the autoencoder.
int  text_encoder_of(const Weight & weight);
bool is_text_weight(const Weight & weight);

// A weight's sizes as its product sees them.
struct WeightForm {
    int64_t out, in; // a vector has `in` 0
    int64_t kh = 1, kw = 1;

    bool    is_vector() const { return in == 0; }
    int64_t taps() const { return kh * kw; }
};
WeightForm form_of(const Weight & weight);

} // namespace sd
