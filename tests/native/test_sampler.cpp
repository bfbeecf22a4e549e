#include "core/error.h"
#include "sampling/sampler.h"

#include <doctest/doctest.h>

#include <cmath>

using Floats = std::vector<float>;

// D of data that are normal with the given deviation: x variance / (variance + sigma^2).
static sd::Denoiser gaussian(float deviation) {
    return [=](const Floats & x, float sigma, Floats & denoised) {
        for (size_t i = 0; i < x.size(); ++i) {
            denoised[i] = x[i] * deviation * deviation / (deviation * deviation + sigma * sigma);
        }
    };
}

static const sd::NoiseSchedule trained = sd::NoiseSchedule::scaled_linear();

static Floats run(const std::string & sampler, Floats x, Floats sigmas, int images = 1, uint64_t seed = 0) {
    std::vector<std::unique_ptr<sd::Rng>> rngs;
    for (int k = 0; k < images; ++k) {
        rngs.push_back(sd::make_rng("cpu", seed + static_cast<uint64_t>(k)));
    }
    sd::SamplerRun request;
    request.sigmas  = std::move(sigmas);
    request.rngs    = &rngs;
    request.trained = &trained;
    request.denoise = gaussian(0.5f);
    sd::sample(sampler, request, x);
    return x;
}

static Floats many_sigmas(int steps) {
    Floats sigmas;
    for (int i = 0; i < steps; ++i) {
        sigmas.push_back(10 * std::pow(0.001f, static_cast<float>(i) / static_cast<float>(steps - 1)));
    }
    sigmas.push_back(0);
    return sigmas;
}

TEST_CASE("samplers without noise follow the flow of Gaussian data to its end") {
    // Along the flow x / sqrt(variance + sigma^2) is constant.
    for (const std::string sampler : {"euler", "heun", "dpm2", "dpm++2m", "ddim", "unipc"}) {
        CAPTURE(sampler);
        const Floats x = run(sampler, {7, -3}, many_sigmas(200));
        CHECK(x[0] == doctest::Approx(7 * 0.5 / std::sqrt(0.25 + 100)).epsilon(0.04));
        CHECK(x[1] == doctest::Approx(-3 * 0.5 / std::sqrt(0.25 + 100)).epsilon(0.04));
    }
}

TEST_CASE("second order shows: twice the steps, a quarter of the error") {
    const double truth = 7 * std::sqrt((0.25 + 0.01) / (0.25 + 100));
    for (const std::string sampler : {"heun", "dpm2", "dpm++2m", "unipc"}) {
        CAPTURE(sampler);
        double error[2];
        for (int k = 0; k < 2; ++k) {
            Floats sigmas = many_sigmas(k == 0 ? 31 : 61); // both come by 0.1
            sigmas.resize(k == 0 ? 21 : 41);
            error[k] = std::fabs(run(sampler, {7}, sigmas)[0] / truth - 1);
        }
        CHECK(error[1] < error[0] / 2.8); // first order would give 2
    }
}

TEST_CASE("samplers with noise draw from the data's distribution") {
    for (const std::string sampler : {"euler_a", "dpm2_a", "dpm++2s_a", "dpm++2m_sde"}) {
        CAPTURE(sampler);
        Floats x(20000);
        sd::make_rng("cpu", 99)->normal(x.data(), x.size());
        for (float & value : x) {
            value *= 10;
        }
        double squares = 0;
        for (const float value : run(sampler, x, many_sigmas(100))) {
            squares += static_cast<double>(value) * value;
        }
        CHECK(std::sqrt(squares / 20000) == doctest::Approx(0.5).epsilon(0.04));
    }
}

TEST_CASE("an image of a batch is the image of its own seed") {
    for (const std::string & sampler : sd::sampler_names()) {
        CAPTURE(sampler);
        const Floats first(20, 3), second(20, -2);
        Floats       both = first;
        both.insert(both.end(), second.begin(), second.end());

        Floats alone = run(sampler, first, many_sigmas(6), 1, 8);
        for (const float value : run(sampler, second, many_sigmas(6), 1, 9)) {
            alone.push_back(value);
        }
        CHECK(run(sampler, both, many_sigmas(6), 2, 8) == alone);
    }
}

TEST_CASE("one step to 0 is the denoiser's word; fewer sigmas change nothing") {
    for (const std::string & sampler : sd::sampler_names()) {
        CAPTURE(sampler);
        CHECK(run(sampler, {2}, {0.5f, 0}) == Floats{1});
        CHECK(run(sampler, {2}, {0.5f}) == Floats{2});
        CHECK(run(sampler, {2}, {}) == Floats{2});
        CHECK(std::isfinite(run(sampler, {2}, {1e30f, 1e-30f, 0})[0]));
    }
}

TEST_CASE("each step is reported once, in order, with the newest estimate") {
    for (const std::string & sampler : sd::sampler_names()) {
        CAPTURE(sampler);
        std::vector<std::unique_ptr<sd::Rng>> rngs;
        rngs.push_back(sd::make_rng("cpu", 0));
        std::vector<int> seen;
        Floats           last, newest;
        sd::SamplerRun   request;
        request.sigmas  = many_sigmas(4);
        request.rngs    = &rngs;
        request.trained = &trained;
        request.denoise = [&](const Floats & x, float sigma, Floats & denoised) {
            gaussian(1)(x, sigma, denoised);
            newest = denoised;
        };
        request.on_step = [&](int step, int steps, const Floats & denoised) {
            CHECK(steps == 4);
            CHECK(denoised == newest);
            seen.push_back(step);
        };
        Floats x = {5};
        sd::sample(sampler, request, x);
        CHECK(seen == std::vector<int>{1, 2, 3, 4});
    }
}

TEST_CASE("what the denoiser throws passes through") {
    for (const std::string & sampler : sd::sampler_names()) {
        std::vector<std::unique_ptr<sd::Rng>> rngs;
        rngs.push_back(sd::make_rng("cpu", 0));
        sd::SamplerRun request;
        request.sigmas  = many_sigmas(4);
        request.rngs    = &rngs;
        request.trained = &trained;
        request.denoise = [calls = 0](const Floats & x, float sigma, Floats & denoised) mutable {
            if (++calls == 3) {
                sd::fail(sd::Status::cancelled, "cancelled");
            }
            gaussian(1)(x, sigma, denoised);
        };
        Floats x(32, 1);
        CHECK_THROWS_WITH_AS(sd::sample(sampler, request, x), "cancelled", sd::Error);
    }
}

TEST_CASE("what makes no sense is refused in a sentence") {
    CHECK(sd::sampler_names().front() == "euler");
    CHECK_THROWS_WITH_AS(run("euler_b", {1}, {1, 0}),
                         "sampler 'euler_b' is not known; there are: euler, euler_a, heun, dpm2, dpm2_a, "
                         "dpm++2s_a, dpm++2m, dpm++2m_sde, ddim, lcm, tcd, unipc", sd::Error);
    CHECK_THROWS_WITH_AS(run("euler", {1}, {1, 1, 0}),
                         "sigma 2 of 3 is 1: each must be below the one before, the last 0 or more",
                         sd::Error);
    CHECK_THROWS_AS(run("euler", {1}, {NAN, 0}), sd::Error);
    CHECK_THROWS_AS(run("euler", {1}, {1, -1}), sd::Error);
    CHECK_THROWS_AS(run("euler", {1, 2, 3}, {1, 0}, 2), sd::Error);
}

TEST_CASE("TCD goes beyond each level, to a share of its timestep, and noise leads back") {
    std::vector<std::unique_ptr<sd::Rng>> rngs;
    rngs.push_back(sd::make_rng("cpu", 3));
    sd::SamplerRun request;
    request.sigmas  = {trained.sigma(999), trained.sigma(499)};
    request.rngs    = &rngs;
    request.trained = &trained;
    request.eta     = 1; // to timestep 0
    request.denoise = [](const Floats & x, float, Floats & denoised) { denoised = Floats(x.size()); };
    Floats x(20000);
    sd::sample("tcd", request, x);
    double squares = 0;
    for (const float value : x) {
        squares += static_cast<double>(value) * value;
    }
    const double up = std::pow(trained.sigma(499), 2) - std::pow(trained.sigma(0), 2);
    CHECK(std::sqrt(squares / 20000) == doctest::Approx(std::sqrt(up)).epsilon(0.02));

    request.sigmas.push_back(0);
    sd::sample("tcd", request, x);
    CHECK(x[0] == 0);
}
