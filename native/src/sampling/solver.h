// What the samplers are written with: the latent, its noise levels, the denoiser and fresh noise.
#pragma once

#include "sampling/sampler.h"

#include <cstddef>
#include <vector>

namespace sd {

using Floats = std::vector<float>;

// One run of a sampler. Coefficients are computed in double, latents are float.
class Solver {
  public:
    Solver(const SamplerRun & run, double eta_of_run, Floats & latent);

    Floats &     x;   // the latent, all images one after another
    const double eta; // share of fresh noise

    size_t steps() const { return run_.sigmas.size() - 1; }
    double sigma(size_t step) const { return run_.sigmas[step]; } // steps() + 1; only the last may be 0
    double sigma_at_share(double sigma, double share) const;      // at the share of its timestep, whole; of 0 it is 0

    bool   is_flow() const { return run_.flow; }
    // Of x = alpha * x0 + sigma * noise.
    double alpha(double sigma) const { return is_flow() ? 1 - sigma : 1; }

    Floats buffer() const { return Floats(x.size()); }

    void denoise(const Floats & noisy, double sigma, Floats & denoised);

    // Makes x `keep` x and `amount` times fresh noise. No noise is drawn for 0, so that the last step draws none.
    void add_noise(double amount, double keep = 1);

    // Reports step `step` (from 0) as finished.
    void finish(size_t step, const Floats & denoised) const;

  private:
    const SamplerRun & run_;
    Floats             noise_; // of one image
};

// a x + b y, element by element; `out` may be either.
void mix(double a, const Floats & x, double b, const Floats & y, Floats & out);

// The methods; where a name in sampler.cpp's table is missing here, it is one of these with another eta.
void euler(Solver & solver);
void heun(Solver & solver);
void dpm2(Solver & solver);
void dpmpp_2s(Solver & solver);
void lcm(Solver & solver);
void tcd(Solver & solver);
void dpmpp_2m(Solver & solver);
void unipc(Solver & solver);

} // namespace sd
