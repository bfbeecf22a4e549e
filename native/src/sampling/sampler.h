// Samplers: from noise to a latent by repeated calls of a denoiser. Plain float loops over
// x = alpha * x0 + sigma * noise, where alpha is 1, or 1 - sigma for a rectified flow.
#pragma once

#include "sampling/rng.h"
#include "sampling/schedule.h"

#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace sd {

// Estimates the clean latent: `denoised` = D(x, sigma), for all images of the batch at once. `denoised` comes
// with the size of `x` and keeps it. May throw, say to cancel: sample() lets it pass.
using Denoiser =
    std::function<void(const std::vector<float> & x, float sigma, std::vector<float> & denoised)>;

// Called after step `step` (1-based) of `steps` with the newest estimate of the clean latent.
using StepCallback = std::function<void(int step, int steps, const std::vector<float> & denoised)>;

struct SamplerRun {
    std::vector<float>                  sigmas; // strictly descending, the last usually 0; one: no steps
    std::vector<std::unique_ptr<Rng>> * rngs = nullptr; // one per image, for samplers that add noise
    float                               eta  = -1;      // share of fresh noise; negative: the sampler's own
    bool                                flow = false;   // a rectified flow; sigmas go to 1 then
    Denoiser                            denoise;
    StepCallback                        on_step; // may be empty
    const NoiseSchedule *               trained = nullptr; // of the model, for samplers that count in its timesteps
};

// Advances `x`, rngs->size() images of equal size one after another, from sigmas.front() to the last.
// Each image draws from its own generator, one randn(its size) per step that adds noise, so an image of a
// batch is the same alone. Throws Error(bad_argument) for an unknown name, or sigmas or eta without sense.
void sample(const std::string & sampler, const SamplerRun & run, std::vector<float> & x);

// The names, the first being the default.
const std::vector<std::string> & sampler_names();

} // namespace sd
