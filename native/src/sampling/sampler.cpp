#include "sampling/sampler.h"

#include "sampling/named_table.h"
#include "sampling/solver.h"

#include <cmath>

namespace sd {

Solver::Solver(const SamplerRun & run, double eta_of_run, Floats & latent)
    : x(latent), eta(eta_of_run), run_(run), noise_(latent.size() / run.rngs->size()) {}

void Solver::denoise(const Floats & noisy, double sigma, Floats & denoised) {
    run_.denoise(noisy, static_cast<float>(sigma), denoised);
    if (denoised.size() != x.size()) {
        fail(Status::internal, "the denoiser got %zu numbers and returned %zu", x.size(), denoised.size());
    }
}

void Solver::add_noise(double amount, double keep) {
    if (keep != 1) {
        mix(keep, x, 0, x, x);
    }
    if (amount == 0) {
        return;
    }
    const float scale = static_cast<float>(amount);
    float *     image = x.data();
    for (const auto & rng : *run_.rngs) {
        rng->normal(noise_.data(), noise_.size());
        for (const float noise : noise_) {
            *image++ += scale * noise;
        }
    }
}

double Solver::sigma_at_share(double sigma, double share) const {
    if (!run_.trained) {
        fail(Status::internal, "the sampler counts in timesteps, and the run has no schedule");
    }
    constexpr double rounding = 1e-3; // of a whole timestep by way of its sigma in float
    return sigma > 0 ? run_.trained->sigma(std::floor(share * run_.trained->timestep(sigma) + rounding)) : 0;
}

void Solver::finish(size_t step, const Floats & denoised) const {
    if (run_.on_step) {
        run_.on_step(static_cast<int>(step) + 1, static_cast<int>(steps()), denoised);
    }
}

void mix(double a, const Floats & x, double b, const Floats & y, Floats & out) {
    const float scale_x = static_cast<float>(a), scale_y = static_cast<float>(b);
    for (size_t i = 0; i < out.size(); ++i) {
        out[i] = scale_x * x[i] + scale_y * y[i];
    }
}

namespace {

struct Sampler {
    const char * name;
    void (*method)(Solver & solver);
    float eta;       // the sampler's own
    bool  takes_eta; // whether the caller may choose another
};

// DDIM in these variables is Euler's method, and its eta is that of the ancestral samplers.
const Sampler samplers[] = {
    {"euler",       euler,    0, false},
    {"euler_a",     euler,    1, true},
    {"heun",        heun,     0, false},
    {"dpm2",        dpm2,     0, false},
    {"dpm2_a",      dpm2,     1, true},
    {"dpm++2s_a",   dpmpp_2s, 1, true},
    {"dpm++2m",     dpmpp_2m, 0, false},
    {"dpm++2m_sde", dpmpp_2m, 1, true},
    {"ddim",        euler,    0, true},
    {"lcm",         lcm,      0, false},
    {"tcd",         tcd,      0.3f, true},
    {"unipc",       unipc,    0, false},
};

void check(const SamplerRun & run, const Floats & x) {
    for (size_t i = 0; i < run.sigmas.size(); ++i) {
        const float sigma = run.sigmas[i];
        if (run.flow && sigma > 1) {
            fail(Status::bad_argument, "sigma %zu of %zu is %g: those of a rectified flow are at most 1", i + 1,
                 run.sigmas.size(), static_cast<double>(sigma));
        }
        if (!std::isfinite(sigma) || sigma < 0 || (i > 0 && sigma >= run.sigmas[i - 1])) {
            fail(Status::bad_argument,
                 "sigma %zu of %zu is %g: each must be below the one before, the last 0 or more", i + 1,
                 run.sigmas.size(), static_cast<double>(sigma));
        }
    }
    if (!std::isfinite(run.eta)) {
        fail(Status::bad_argument, "eta is %g: it must be a number, usually between 0 and 1",
             static_cast<double>(run.eta));
    }
    if (!run.rngs || run.rngs->empty() || x.size() % run.rngs->size() != 0) {
        fail(Status::bad_argument, "%zu numbers are not %zu images of equal size", x.size(),
             run.rngs ? run.rngs->size() : 0);
    }
}

} // namespace

void sample(const std::string & sampler, const SamplerRun & run, std::vector<float> & x) {
    const Sampler & row = find_named("sampler", samplers, sampler);
    if (run.flow && row.method == tcd) {
        fail(Status::bad_argument, "sampler 'tcd' counts in timesteps of a diffusion, which a rectified flow has not; "
                                   "take 'euler' or 'lcm'");
    }
    check(run, x);
    if (run.sigmas.size() < 2) {
        return;
    }
    Solver solver(run, row.takes_eta && run.eta >= 0 ? run.eta : row.eta, x);
    row.method(solver);
}

const std::vector<std::string> & sampler_names() {
    static const std::vector<std::string> names = names_of(samplers);
    return names;
}

} // namespace sd
