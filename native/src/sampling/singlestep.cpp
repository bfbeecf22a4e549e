// Samplers that forget the step before. In x = x0 + sigma * noise the flow is dx/dsigma = (x - D) / sigma
// (Karras 2022, "EDM"), so Euler's step to `next` is a mean of x and D with the weights next / sigma and
// 1 - next / sigma; at next = 0 it is D.
#include "sampling/solver.h"

#include <algorithm>
#include <cmath>

namespace sd {
namespace {

// A step to `next` as a deterministic one to `down` and fresh noise of size `up`: down^2 + up^2 = next^2.
struct Split {
    double down, up;
};

// Song 2020, "DDIM", eq. 16, in these variables; eta = 1 is DDPM's step.
Split split_step(double sigma, double next, double eta) {
    const double ratio = next / sigma;
    const double up    = std::min(next, eta * next * std::sqrt(1 - ratio * ratio));
    return {std::sqrt(next * next - up * up), up};
}

void euler_step(double sigma, double next, const Floats & x, const Floats & denoised, Floats & out) {
    mix(next / sigma, x, 1 - next / sigma, denoised, out);
}

} // namespace

void euler(Solver & solver) {
    Floats denoised = solver.buffer();
    for (size_t step = 0; step < solver.steps(); ++step) {
        const double sigma    = solver.sigma(step);
        const auto [down, up] = split_step(sigma, solver.sigma(step + 1), solver.eta);
        solver.denoise(solver.x, sigma, denoised);
        euler_step(sigma, down, solver.x, denoised, solver.x);
        solver.add_noise(up);
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
        const auto [down, up] = split_step(sigma, solver.sigma(step + 1), solver.eta);
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
        solver.add_noise(up);
        solver.finish(step, denoised);
    }
}

// Lu 2022, "DPM-Solver++", algorithm 1 with the middle in log(sigma): as dpm2, but it is D that counts there.
void dpmpp_2s(Solver & solver) {
    Floats denoised = solver.buffer(), middle = solver.buffer();
    for (size_t step = 0; step < solver.steps(); ++step) {
        const double sigma    = solver.sigma(step);
        const auto [down, up] = split_step(sigma, solver.sigma(step + 1), solver.eta);
        solver.denoise(solver.x, sigma, denoised);
        if (down > 0) {
            const double half = std::sqrt(sigma * down);
            euler_step(sigma, half, solver.x, denoised, middle);
            solver.denoise(middle, half, denoised);
        }
        euler_step(sigma, down, solver.x, denoised, solver.x);
        solver.add_noise(up);
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
        solver.add_noise(solver.sigma(step + 1));
        solver.finish(step, denoised);
    }
}

} // namespace sd
