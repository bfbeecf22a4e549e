// Samplers that forget the step before. Without fresh noise x follows dx/dsigma = (x - D) / sigma, whether it is
// x0 + sigma * noise (Karras 2022, "EDM") or on the straight line of a rectified flow, so Euler's step to `next` is a mean
// of x and D with the weights next / sigma and 1 - next / sigma; at next = 0 it is D.
#include "sampling/solver.h"

#include <algorithm>
#include <cmath>

namespace sd {
namespace {

// A step to `next` as a deterministic one to `down`, of which `keep` is kept, and fresh noise of size `up`.
struct Split {
    double down, keep, up;
};

// Song 2020, "DDIM", eq. 16, in these variables; eta = 1 is DDPM's step: down^2 + up^2 = next^2. A flow steps further down
// by that share of its step, and comes back up with the clean latent's part as it is at `next` and noise that makes up
// for the rest (ComfyUI's ancestral samplers for rectified flows).
Split split_step(const Solver & solver, double sigma, double next) {
    const double ratio = next / sigma, eta = solver.eta;
    if (solver.is_flow()) {
        const double down = next * std::max(0.0, 1 - eta * (1 - ratio));
        const double keep = solver.alpha(next) / solver.alpha(down);
        return {down, keep, std::sqrt(std::max(0.0, next * next - down * down * keep * keep))};
    }
    const double up = std::min(next, eta * next * std::sqrt(1 - ratio * ratio));
    return {std::sqrt(next * next - up * up), 1, up};
}

// Half way in the logarithm of alpha / sigma. A flow begins where that is minus infinity.
double middle_of(const Solver & solver, double sigma, double down) {
    constexpr double just_below_1 = 0.9999; // as in ComfyUI
    if (!solver.is_flow()) {
        return std::sqrt(sigma * down);
    }
    if (sigma >= 1) {
        return just_below_1;
    }
    const double odds = std::sqrt(sigma * down / (solver.alpha(sigma) * solver.alpha(down)));
    return odds / (1 + odds);
}

void euler_step(double sigma, double next, const Floats & x, const Floats & denoised, Floats & out) {
    mix(next / sigma, x, 1 - next / sigma, denoised, out);
}

} // namespace

void euler(Solver & solver) {
    Floats denoised = solver.buffer();
    for (size_t step = 0; step < solver.steps(); ++step) {
        const double sigma    = solver.sigma(step);
        const auto [down, keep, up] = split_step(solver, sigma, solver.sigma(step + 1));
        solver.denoise(solver.x, sigma, denoised);
        euler_step(sigma, down, solver.x, denoised, solver.x);
        solver.add_noise(up, keep);
        solver.finish(step, denoised);
    }
}

// Karras 2022, algorithm 1: the mean of the slopes at both ends.
void heun(Solver & solver) {
    Floats denoised = solver.buffer(), ahead = solver.buffer(), slope = solver.buffer();
    for (size_t step = 0; step < solver.steps(); ++step) {
        const double sigma = solver.sigma(step), next = solver.sigma(step + 1);
        solver.denoise(solver.x, sigma, denoised);
        if (next == 0) {
            euler_step(sigma, next, solver.x, denoised, solver.x);
        } else {
            mix(1 / sigma, solver.x, -1 / sigma, denoised, slope);
            euler_step(sigma, next, solver.x, denoised, ahead);
            solver.denoise(ahead, next, denoised);
            mix(1, slope, 1 / next, ahead, slope);
            mix(1, slope, -1 / next, denoised, slope);
            mix(1, solver.x, (next - sigma) / 2, slope, solver.x);
        }
        solver.finish(step, denoised);
    }
}

// Lu 2022, "DPM-Solver", its second order: the slope at the middle of the step in log(sigma).
void dpm2(Solver & solver) {
    Floats denoised = solver.buffer(), middle = solver.buffer();
    for (size_t step = 0; step < solver.steps(); ++step) {
        const double sigma    = solver.sigma(step);
        const auto [down, keep, up] = split_step(solver, sigma, solver.sigma(step + 1));
        solver.denoise(solver.x, sigma, denoised);
        if (down == 0) {
            euler_step(sigma, down, solver.x, denoised, solver.x);
        } else {
            const double half = std::sqrt(sigma * down);
            euler_step(sigma, half, solver.x, denoised, middle);
            solver.denoise(middle, half, denoised);
            mix(1, middle, -1, denoised, middle);
            mix(1, solver.x, (down - sigma) / half, middle, solver.x);
        }
        solver.add_noise(up, keep);
        solver.finish(step, denoised);
    }
}

// Lu 2022, "DPM-Solver++", algorithm 1 with the middle in log(alpha / sigma): as dpm2, but it is D that counts there.
void dpmpp_2s(Solver & solver) {
    Floats denoised = solver.buffer(), middle = solver.buffer();
    for (size_t step = 0; step < solver.steps(); ++step) {
        const double sigma    = solver.sigma(step);
        const auto [down, keep, up] = split_step(solver, sigma, solver.sigma(step + 1));
        solver.denoise(solver.x, sigma, denoised);
        if (down > 0) {
            const double half = middle_of(solver, sigma, down);
            euler_step(sigma, half, solver.x, denoised, middle);
            solver.denoise(middle, half, denoised);
        }
        euler_step(sigma, down, solver.x, denoised, solver.x);
        solver.add_noise(up, keep);
        solver.finish(step, denoised);
    }
}

// Zheng 2024, "Trajectory Consistency Distillation", algorithm 4, where eta is its gamma: a step of Euler's goes beyond the
// next level, to a share 1 - eta of its timestep, and fresh noise leads back.
void tcd(Solver & solver) {
    constexpr double rounding = 1e-6; // of sigmas, which are floats
    Floats           denoised = solver.buffer();
    for (size_t step = 0; step < solver.steps(); ++step) {
        const double sigma = solver.sigma(step), next = solver.sigma(step + 1);
        const double share = std::max(0.0, 1 - solver.eta);
        const double beyond = solver.eta > 0 ? solver.sigma_at_share(next, share) : next;
        const double down = beyond < (1 - rounding) * next ? beyond : next;
        solver.denoise(solver.x, sigma, denoised);
        euler_step(sigma, down, solver.x, denoised, solver.x);
        solver.add_noise(std::sqrt(next * next - down * down));
        solver.finish(step, denoised);
    }
}

// Luo 2023, "Latent Consistency Models", multistep sampling: denoise, then noise anew. The paper's boundary
// scaling of the estimate (c_skip, c_out; timesteps times 10) is left out: below 1e-6 above timestep 50.
void lcm(Solver & solver) {
    Floats denoised = solver.buffer();
    for (size_t step = 0; step < solver.steps(); ++step) {
        solver.denoise(solver.x, solver.sigma(step), denoised);
        std::copy(denoised.begin(), denoised.end(), solver.x.begin());
        solver.add_noise(solver.sigma(step + 1), solver.alpha(solver.sigma(step + 1)));
        solver.finish(step, denoised);
    }
}

} // namespace sd
