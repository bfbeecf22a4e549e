// The LoRAs of one context: brings what is in force to what is asked for, in one transaction.
#pragma once

#include "core/log.h"
#include "core/tensor.h"
#include "lora/lora_cache.h"
#include "lora/lora_merge.h"
#include "lora/lora_pack.h"
#include "lora/lora_state.h"

#include <functional>
#include <memory>
#include <set>
#include <string>
#include <vector>

namespace sd {

enum class LoraMode {
    runtime, // weights stay as they are; adapters act in the graph
    restore, // touched weights are rebuilt from the base
    diff     // touched weights get the differences added
};

struct LoraOptions {
    LoraMode mode = LoraMode::runtime;
    MergeOptions merge;
    bool strict = false;                  // any key that fits nothing is an error
    size_t cache_bytes = size_t{2} << 30; // of LoRAs that no prompt names at the moment
    Log log;
};

class LoraEngine {
  public:
    LoraEngine(WeightStore & weights, const Device & device, LoraReader read, LoraOptions options);

    // Makes exactly this in force. Whether anything had to change. Where it throws, weights and state are as
    // they were: files are read, checked and packed before anything changes.
    bool apply(const LoraState & wanted);

    // Nothing in force, and every weight the base's own, bit for bit, whatever `diff` has left in it.
    void reset();

    const LoraState & state() const { return state_; } // canonical
    std::vector<LoraReport> reports() const;           // of the files in force
    const LoraOptions & options() const { return options_; }

    // For Runner::adapt(); null where nothing acts in the graph.
    const Adapters * adapters() const;
    // Strengths for text encoding of one image's prompt: [entries, 1].
    Tensor text_strengths(size_t image) const;
    // Strengths for a run of the denoiser in step `step` of `steps`, counted from 0, over `runs` latents,
    // where latent i is of image i % images: [entries, 1] where all are alike, else [entries, runs].
    Tensor denoiser_strengths(int step, int steps, int64_t runs) const;

    // What the text encoders of one image are changed by: equal where conditioning may be reused.
    std::string text_identity(size_t image) const;

    // In `diff`: the relative RMS of the touched weights against what `restore` would hold.
    double drift() const;

  private:
    using Loras = std::vector<std::shared_ptr<const LoadedLora>>; // one per path, sorted by path

    LoraState resolved(const LoraState & wanted) const;
    Loras load(const LoraState & state);
    void check(const LoraState & state) const;
    bool change(LoraState state);
    void tell(const Loras & loras);
    std::vector<ActiveUpdate> active(const LoraState & state, const Loras & loras) const;
    std::vector<WeightSum> sums(const LoraState & state, const Loras & loras) const;
    void rebuild(const std::vector<WeightSum> & wanted);
    void add_differences(const std::vector<WeightSum> & wanted);
    const std::vector<LoraUse> & uses(size_t image) const;
    void strengths_of(size_t image, const std::function<bool(const LoraUse &)> & acts, float * to) const;

    WeightStore & weights_;
    const Device & device_;
    LoraOptions options_;
    LoraCache cache_;
    LoraMerge merge_;
    LoraState state_;
    Loras loras_;
    std::unique_ptr<LoraPack> pack_;   // runtime: the last set, also while nothing is in force
    Loras packed_;                     // what it is of
    bool acts_ = false;                // whether the pack is in force
    std::set<std::string> told_;       // stamps of files whose leftovers were logged
    std::vector<WeightSum> sums_;      // restore, diff: in force
    std::set<const Weight *> touched_; // restore, diff: by anything since the last reset
    // diff: what rounding has left in the text encoders by now; 0: nothing, others never come again.
    uint64_t text_drift_ = 0, text_drifts_ = 0;
};

} // namespace sd
