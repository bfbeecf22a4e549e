// Noise levels: what a model was trained on, and which of them a run visits.
#pragma once

#include <string>
#include <vector>

namespace sd {

// The levels of "Align Your Steps" for ten steps (Sabour 2024,
// https://research.nvidia.com/labs/toronto-ai/AlignYourSteps/howto.html).
const std::vector<float> & align_your_steps_sd1();  // [11]
const std::vector<float> & align_your_steps_sdxl(); // [11]

// The noise levels that a network was trained on, ascending by timestep:
// sigma = sqrt((1 - alpha_bar) / alpha_bar).
class NoiseSchedule {
  public:
    // The "scaled linear" betas of Stable Diffusion 1.x, 2.x and XL: 0.00085 to 0.012 in 1,000 steps, linear
    // in sqrt(beta). `aligned` are the family's levels for scheduler "ays"; empty where none are published.
    static NoiseSchedule scaled_linear(const std::vector<float> & aligned = align_your_steps_sd1());

    const std::vector<float> & sigmas() const { return sigmas_; }   // [1000], by timestep
    const std::vector<float> & aligned() const { return aligned_; } // [11] or empty, descending

    // Between timesteps linear in log(sigma), as k-diffusion; the ends hold for whatever lies beyond them.
    float sigma(double timestep) const;
    float timestep(double sigma) const; // its inverse

  private:
    std::vector<float>  sigmas_, aligned_;
    std::vector<double> log_sigmas_;
};

// `steps` noise levels, strictly descending, and a last 0. Throws Error(bad_argument) for an unknown name or
// more steps than the scheduler has levels, Error(unsupported) where the model has no such schedule.
std::vector<float> make_sigmas(const std::string & scheduler, const NoiseSchedule & trained, int steps);

// The names, the first being the default.
const std::vector<std::string> & scheduler_names();

} // namespace sd
