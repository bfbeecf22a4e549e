// Noise levels: what a model was trained on, and which of them a run visits.
#pragma once

#include <string>
#include <vector>

namespace sd {

// The levels of "Align Your Steps" for ten steps (Sabour 2024,
// https://research.nvidia.com/labs/toronto-ai/AlignYourSteps/howto.html).
const std::vector<float> & align_your_steps_sd1();  // [11]
const std::vector<float> & align_your_steps_sdxl(); // [11]

// The noise levels that a network was trained on, ascending by timestep. A noisy latent is either the clean one plus
// sigma times noise, sigma = sqrt((1 - alpha_bar) / alpha_bar); or, of a rectified flow, (1 - sigma) times the clean
// one plus sigma times noise, sigma up to 1.
class NoiseSchedule {
  public:
    // The "scaled linear" betas of Stable Diffusion 1.x, 2.x and XL: 0.00085 to 0.012 in 1,000 steps, linear
    // in sqrt(beta). `aligned` are the family's levels for scheduler "ays"; empty where none are published.
    // With `zero_snr` sqrt(alpha_bar) is shifted and scaled so that it begins where it did and ends at 0 (Lin et al.,
    // 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", algorithm 1). As in diffusers the last
    // alpha_bar is 2^-24, that is a sigma of 4096, instead of 0.
    static NoiseSchedule scaled_linear(const std::vector<float> & aligned = align_your_steps_sd1(), bool zero_snr = false);

    // A rectified flow, whose 1,000 levels t/1000 are shifted to s t / (1 + (s - 1) t) (Esser et al., 2024, "Scaling
    // Rectified Flow Transformers for High-Resolution Image Synthesis", eq. 23). Of `shifts_once` see first_timestep().
    static NoiseSchedule flow(double shift, bool shifts_once = false);

    bool is_flow() const { return shift_ > 0; }

    const std::vector<float> & sigmas() const { return sigmas_; }   // [1000], by timestep
    const std::vector<float> & aligned() const { return aligned_; } // [11] or empty, descending

    // Between timesteps linear in log(sigma), as k-diffusion; the ends hold for whatever lies beyond them. Of a flow
    // the shift of (timestep + 1) / 1000.
    float sigma(double timestep) const;
    // By what the network is told of a level: the inverse of sigma(); of a flow 1000 sigma.
    float timestep(double sigma) const;
    // Where evenly spaced timesteps end: 0; of a flow, as diffusers and ComfyUI have it, where sigma() shifts the
    // lowest level a second time, unless it `shifts_once`, as diffusers where the shift grows with the picture.
    double first_timestep() const { return is_flow() && !shifts_once_ ? 1000.0 * sigmas_.front() - 1 : 0; }

  private:
    std::vector<float>  sigmas_, aligned_;
    std::vector<double> log_sigmas_;
    double              shift_ = 0; // of a flow
    bool                shifts_once_ = false;
};

// `steps` noise levels, strictly descending, and a last 0. Throws Error(bad_argument) for an unknown name or
// more steps than the scheduler has levels, Error(unsupported) where the model has no such schedule.
std::vector<float> make_sigmas(const std::string & scheduler, const NoiseSchedule & trained, int steps);

// The names, the first being the default.
const std::vector<std::string> & scheduler_names();

} // namespace sd
