// What a request must be, and what it has where it says nothing.
#include "context.h"

#include "core/error.h"
#include "families/distilled.h"
#include "sampling/rng.h"

#include <algorithm>
#include <array>
#include <cmath>

namespace sd {
namespace {

constexpr int max_side = 16384; // pixels
constexpr int max_steps = 10000;
constexpr int max_told = 1 << 16; // pixels of a side that SDXL is told
constexpr int max_batch = 1024;

void check_prompts(const char * what, const std::vector<Prompt> & prompts, int batch_size) {
    if (prompts.size() > 1 && prompts.size() != static_cast<size_t>(batch_size)) {
        fail(Status::bad_argument, "%zu %ss for a batch of %d: give one, or one per image", prompts.size(), what, batch_size);
    }
    for (const Prompt & prompt : prompts) {
        for (const Span & span : prompt) {
            if (!std::isfinite(span.weight)) {
                fail(Status::bad_argument, "the %s weights '%s' by %g; weights are finite numbers", what,
                     span.text.c_str(), static_cast<double>(span.weight));
            }
        }
    }
}

int nearest_multiple(int value, int multiple) {
    return std::max(multiple, (value + multiple / 2) / multiple * multiple);
}

} // namespace

// Fills in what was left out, and refuses what can't be painted.
void Context::complete(Request & r) const {
    const Defaults defaults = pipeline_->defaults();
    const int      multiple = pipeline_->size_multiple();
    if (r.width < 1 || r.height < 1 || r.width > max_side || r.height > max_side) {
        fail(Status::bad_argument, "size %d x %d: both must be between %d and %d", r.width, r.height, multiple, max_side);
    }
    if (r.width % multiple != 0 || r.height % multiple != 0) {
        fail(Status::bad_argument, "size %d x %d: both must be multiples of %d; the nearest is %d x %d", r.width, r.height,
             multiple, nearest_multiple(r.width, multiple), nearest_multiple(r.height, multiple));
    }
    if (r.steps < 1 || r.steps > max_steps) {
        fail(Status::bad_argument, "steps %d: must be between 1 and %d", r.steps, max_steps);
    }
    if (!std::isfinite(r.cfg_scale)) {
        fail(Status::bad_argument, "cfg_scale %g: must be a finite number", static_cast<double>(r.cfg_scale));
    }
    if (!(r.guidance_rescale >= 0 && r.guidance_rescale <= 1)) {
        fail(Status::bad_argument, "guidance_rescale %g: must be between 0 and 1", static_cast<double>(r.guidance_rescale));
    }
    complete_sizes(r);
    if (!std::isfinite(r.eta)) {
        fail(Status::bad_argument, "eta %g: must be a finite number", static_cast<double>(r.eta));
    }
    if (!std::isfinite(r.guidance) || (r.guidance >= 0 && defaults.guidance == 0)) {
        fail(Status::bad_argument, "guidance %g: %s", static_cast<double>(r.guidance),
             std::isfinite(r.guidance) ? "this model takes none; use cfg_scale" : "must be a finite number");
    }
    if (!(r.shift >= 0 && r.shift <= 100)) {
        fail(Status::bad_argument, "shift %g: must be between 0 and 100", static_cast<double>(r.shift));
    }
    if (r.shift > 0 && pipeline_->prediction() != Prediction::flow) {
        fail(Status::bad_argument, "shift %g: only models of rectified flows, as FLUX and SD3, have one",
             static_cast<double>(r.shift));
    }
    if (r.batch_size < 1 || r.batch_size > max_batch) {
        fail(Status::bad_argument, "batch_size %d: must be between 1 and %d", r.batch_size, max_batch);
    }
    if (!(r.strength >= 0 && r.strength <= 1)) {
        fail(Status::bad_argument, "strength %g: must be between 0 and 1", static_cast<double>(r.strength));
    }
    if (r.mask && !r.init_image) {
        fail(Status::bad_argument, "a mask was given without init_image, the picture that it masks");
    }
    const auto fits = [&](int side) { return side >= multiple && side <= max_side && side % multiple == 0; };
    if (r.reference_image && !(fits(r.reference_width) && fits(r.reference_height))) {
        fail(Status::bad_argument, "reference_image of %d x %d: both must be multiples of %d, at most %d", r.reference_width,
             r.reference_height, multiple, max_side);
    }
    if (r.reference_image && !pipeline_->takes_reference()) {
        fail(Status::bad_argument, "a reference_image was given, but this model does not look at one; FLUX.1 Kontext does");
    }
    if (r.redux_image && pipeline_->redux_size() == 0) {
        fail(Status::bad_argument, "a redux_image was given, but there is no Redux to look at it; open a FLUX.1 with redux= and "
             "clip_vision=, its image embedder and SigLIP");
    }
    if (!std::isfinite(r.redux_strength)) {
        fail(Status::bad_argument, "redux_strength %g: must be a finite number", static_cast<double>(r.redux_strength));
    }
    if (r.vae_tile < 0 || r.vae_tile > max_side || r.vae_tile % (4 * multiple) != 0) {
        fail(Status::bad_argument, "vae_tile %d: must be 0 or a multiple of %d pixels", r.vae_tile, 4 * multiple);
    }
    if (r.prompts.empty()) {
        fail(Status::bad_argument, "no prompt was given");
    }
    check_prompts("prompt", r.prompts, r.batch_size);
    check_prompts("negative prompt", r.negative_prompts, r.batch_size);
    if (r.negative_prompts.empty()) {
        r.negative_prompts.push_back({});
    }
    if (r.clip_skip == 0) {
        r.clip_skip = defaults.clip_skip;
    }
    if (r.guidance < 0) {
        r.guidance = defaults.guidance;
    }
    r.sampler = r.sampler.empty() ? defaults.sampler : r.sampler;
    r.scheduler = r.scheduler.empty() ? defaults.scheduler : r.scheduler;
    r.rng = r.rng.empty() ? rng_names().front() : r.rng;
}

// Sizes that were left out are the picture's own, not cropped; of the negative ones as the others.
void Context::complete_sizes(Request & r) const {
    const auto each = [](PictureSizes & s) {
        return std::array<int *, 6>{&s.original_width, &s.original_height, &s.crop_top,
                                    &s.crop_left,      &s.target_width,    &s.target_height};
    };
    const auto is_crop = [](size_t i) { return i == 2 || i == 3; };
    const auto is_given = [&](size_t i, int pixels) { return is_crop(i) ? pixels >= 0 : pixels != 0; };
    PictureSizes own{r.width, r.height, 0, 0, r.width, r.height};
    const auto   fill = [&](PictureSizes & sizes, PictureSizes & usual) {
        const auto values = each(sizes), other = each(usual);
        for (size_t i = 0; i < values.size(); ++i) {
            if (!is_given(i, *values[i])) {
                *values[i] = *other[i];
            } else if (!pipeline_->takes_sizes()) {
                fail(Status::bad_argument, "original_size, crop_top_left and target_size: SDXL is told them, and this is a "
                     "model of %s; leave them out", family_->written().c_str());
            } else if (*values[i] < (is_crop(i) ? 0 : 1) || *values[i] > max_told) {
                fail(Status::bad_argument, "original_size, crop_top_left and target_size: %d pixels; there may be %d to %d",
                     *values[i], is_crop(i) ? 0 : 1, max_told);
            }
        }
    };
    fill(r.sizes, own);
    fill(r.negative_sizes, r.sizes);
}

// A picture to follow is for models and LoRAs that look at one, and those need it.
void Context::check_control(const Request & r) const {
    const bool of_lora = loras_.control_inputs() > 0, of_model = pipeline_->extra_input() == ExtraInput::control;
    if (of_lora && pipeline_->extra_input() != ExtraInput::none) {
        fail(Status::bad_argument, "a control LoRA is for the plain model; this one has other inputs already");
    }
    if ((of_lora || of_model) && !r.control_image) {
        const int64_t plain = 4 * pipeline_->latent_format().channels, more = of_lora ? loras_.control_inputs() : plain;
        fail(Status::bad_argument, "%s takes %lld input features, where the plain model has %lld: it needs a control_image, a "
             "picture of edges or depths to follow", of_lora ? "a control LoRA that is in force" : "this model",
             static_cast<long long>(plain + more), static_cast<long long>(plain));
    }
    if (of_lora && r.reference_image) {
        fail(Status::bad_argument, "a control LoRA is in force, whose inputs a reference_image does not have; leave one of them out");
    }
    if (r.control_image && !of_lora && !of_model) {
        fail(Status::bad_argument, "a control_image was given, but neither the model nor a LoRA in force looks at one");
    }
}

// LoRAs that were distilled for a few steps paint burnt pictures with the usual settings, and seem broken.
void Context::hint_at_settings(const Request & r) {
    for (const std::vector<LoraUse> & uses : loras_.state().images) {
        for (const LoraUse & use : uses) {
            const auto settings = settings_of_lora(use.path, *pipeline_);
            const bool fits = !settings || use.unet == 0 ||
                              (r.steps <= 2 * settings->steps && (r.cfg_scale <= 2 * settings->cfg_scale) &&
                               std::abs(use.unet) <= 2 * settings->multiplier);
            if (log_ && !fits && hinted_.insert(use.path).second) {
                log_(Level::warning, text("%s: by its name %s; this picture has steps %d, cfg_scale %g and multiplier %g",
                                          use.path.c_str(), settings->sentence.c_str(), r.steps,
                                          static_cast<double>(r.cfg_scale), use.unet));
            }
        }
    }
}

} // namespace sd
