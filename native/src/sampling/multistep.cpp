// Samplers that use the estimates of earlier steps. A step of h = log(sigma / next) is, to first order,
// Euler's: (1 - take) x + take D with take = 1 - exp(-h); here D is extrapolated over the step.
#include "sampling/solver.h"

#include <algorithm>
#include <cmath>

namespace sd {

// Lu 2022, "DPM-Solver++", algorithm 2, and its SDE (appendix; midpoint), where eta scales the SDE's noise: over a step of h
// in log(alpha / sigma) it brings exp(-eta h) more decay, and noise that makes up for it. The noise is fresh in each step,
// as in diffusers; k-diffusion's comes from a Brownian tree. Without noise a flow is stepped in log(1 / sigma) like the
// others, which is finite where it begins (ComfyUI); with noise its first step from sigma = 1 has an infinite h, and
// forgets where it came from.
void dpmpp_2m(Solver & solver) {
    const bool noisy = solver.eta > 0;
    Floats denoised = solver.buffer(), before = solver.buffer();
    double h_before = 0;
    for (size_t step = 0; step < solver.steps(); ++step) {
        const double sigma = solver.sigma(step), next = solver.sigma(step + 1);
        const double alpha = solver.alpha(sigma), alpha_next = solver.alpha(next);
        const double h     = noisy ? std::log(alpha_next / alpha * sigma / next) : std::log(sigma / next); // infinite to 0
        const double keep  = noisy ? next / sigma * std::exp(-solver.eta * h) : next / sigma;
        const double take  = alpha_next - alpha * keep;

        solver.denoise(solver.x, sigma, denoised);
        mix(keep, solver.x, take, denoised, solver.x);
        if (step > 0 && next > 0) {
            const double beyond = take * h / (2 * h_before);
            mix(1, solver.x, beyond, denoised, solver.x);
            mix(1, solver.x, -beyond, before, solver.x);
        }
        if (noisy && next > 0) {
            solver.add_noise(next * std::sqrt(-std::expm1(-2 * solver.eta * h)));
        }
        solver.finish(step, denoised);
        std::swap(before, denoised);
        h_before = h;
    }
}

namespace {

// The weights of a second order corrector: solves R rho = b of Zhao 2023, section 3, for B(h) = exp(h) - 1
// ("bh2") and the prediction of x0. `r` is where the estimate before lies, in steps: below 0.
struct Weights {
    double before, ahead;
};

Weights corrector_weights(double r, double h) {
    const double phi_1 = std::expm1(-h);
    const double phi_2 = phi_1 / -h - 1;
    const double phi_3 = phi_2 / -h - 0.5;
    const double b_1 = phi_2 / phi_1, b_2 = 2 * phi_3 / phi_1;
    const double before = (b_1 - b_2) / (1 - r);
    return {before, b_1 - before};
}

} // namespace

// Zhao 2023, "UniPC", second order, predicting x0, first order in the last step: each estimate first corrects
// the step that led to it, at no cost, then serves for the next.
void unipc(Solver & solver) {
    // Estimates at this step and the two before, and x (corrected) before the last step.
    Floats now = solver.buffer(), last = solver.buffer(), older = solver.buffer(), from = solver.buffer();
    double h = 0, h_last = 0; // lengths of the last step and of the one before
    for (size_t step = 0; step < solver.steps(); ++step) {
        const double sigma = solver.sigma(step), next = solver.sigma(step + 1);
        solver.denoise(solver.x, sigma, now);
        if (step > 0) {
            const double  take = -std::expm1(-h), r = -h_last / h;
            const Weights weights = step > 1 ? corrector_weights(r, h) : Weights{0, 0.5};
            const double  of_older = step > 1 ? weights.before / r : 0;
            mix(1 - take, from, take * weights.ahead, now, solver.x);
            mix(1, solver.x, take * (1 - weights.ahead - of_older), last, solver.x);
            mix(1, solver.x, take * of_older, older, solver.x);
        }
        std::copy(solver.x.begin(), solver.x.end(), from.begin());

        h_last = h;
        h      = std::log(sigma / next);
        const double take   = -std::expm1(-h);
        const bool   second = step > 0 && step + 1 < solver.steps();
        const double beyond = second ? take * h / (2 * h_last) : 0;
        mix(1 - take, from, take + beyond, now, solver.x);
        mix(1, solver.x, -beyond, last, solver.x);

        solver.finish(step, now);
        std::swap(older, last);
        std::swap(last, now);
    }
}

} // namespace sd
