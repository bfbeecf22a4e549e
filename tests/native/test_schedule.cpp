#include "core/error.h"
#include "sampling/schedule.h"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>

static const sd::NoiseSchedule trained = sd::NoiseSchedule::scaled_linear();

static void check_close(const std::vector<float> & got, const std::vector<float> & want) {
    REQUIRE(got.size() == want.size());
    for (size_t i = 0; i < want.size(); ++i) {
        CHECK(std::fabs(got[i] - want[i]) <= 5.1e-5f * std::fmax(1.0f, want[i]));
    }
}

TEST_CASE("Stable Diffusion 1.x was trained on sigmas 0.0292 to 14.6146") {
    CHECK(trained.sigmas().size() == 1000);
    CHECK(trained.sigmas().front() == doctest::Approx(0.0291671).epsilon(1e-5));
    CHECK(trained.sigmas().back() == doctest::Approx(14.614647).epsilon(1e-6));
}

TEST_CASE("sigma and timestep are each other's inverse") {
    for (double t = 0; t <= 999; t += 0.37) {
        CHECK(trained.timestep(trained.sigma(t)) == doctest::Approx(t).epsilon(1e-4));
    }
    for (size_t t = 0; t < 1000; ++t) {
        CHECK(trained.sigma(static_cast<double>(t)) == doctest::Approx(trained.sigmas()[t]).epsilon(1e-7));
    }
    // Halfway between timesteps lies the geometric mean.
    CHECK(trained.sigma(500.5) ==
          doctest::Approx(std::sqrt(trained.sigmas()[500] * trained.sigmas()[501])).epsilon(1e-6));
}

TEST_CASE("beyond the ends the ends hold, and nothing is out of bounds") {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    const double infinity = std::numeric_limits<double>::infinity();
    CHECK(trained.timestep(0) == 0);
    CHECK(trained.timestep(-1) == 0);
    CHECK(trained.timestep(nan) == 0);
    CHECK(trained.timestep(14.615) == 999);
    CHECK(trained.timestep(infinity) == 999);
    CHECK(trained.sigma(-3) == trained.sigmas().front());
    CHECK(trained.sigma(nan) == trained.sigmas().front());
    CHECK(trained.sigma(infinity) == trained.sigmas().back());
}

TEST_CASE("schedules begin and end as published") {
    check_close(sd::make_sigmas("karras", trained, 5), {14.6146f, 4.7965f, 1.2741f, 0.24795f, 0.02917f, 0});
    check_close(sd::make_sigmas("normal", trained, 2), {14.6146f, 0.0292f, 0});
    check_close(sd::make_sigmas("exponential", trained, 3), {14.6146f, 0.6529f, 0.0292f, 0});
    check_close(sd::make_sigmas("ays", trained, 10),
                {14.615f, 6.475f, 3.861f, 2.697f, 1.886f, 1.396f, 0.963f, 0.652f, 0.399f, 0.152f, 0});
}

TEST_CASE("every schedule gives the steps asked for, falling to 0") {
    for (const std::string & name : sd::scheduler_names()) {
        for (int steps = 1; steps <= 1000; steps += steps < 150 ? 1 : 17) {
            const std::vector<float> sigmas = sd::make_sigmas(name, trained, steps);
            REQUIRE(sigmas.size() == static_cast<size_t>(steps) + 1);
            for (int i = 0; i < steps; ++i) {
                REQUIRE(sigmas[static_cast<size_t>(i)] > sigmas[static_cast<size_t>(i) + 1]);
            }
            REQUIRE(sigmas.back() == 0);
        }
    }
}

TEST_CASE("what cannot be scheduled is refused in a sentence") {
    CHECK(sd::scheduler_names().front() == "normal");
    CHECK_THROWS_WITH_AS(sd::make_sigmas("cosine", trained, 4),
                         "scheduler 'cosine' is not known; there are: normal, karras, exponential, "
                         "sgm_uniform, simple, ddim_uniform, beta, ays", sd::Error);
    CHECK_THROWS_WITH_AS(sd::make_sigmas("normal", trained, 0), "steps 0: must be between 1 and 10000",
                         sd::Error);
    CHECK_THROWS_AS(sd::make_sigmas("simple", trained, 1001), sd::Error);
    CHECK_THROWS_AS(sd::make_sigmas("ays", sd::NoiseSchedule::scaled_linear({}), 10), sd::Error);

    const auto sdxl = sd::NoiseSchedule::scaled_linear(sd::align_your_steps_sdxl());
    CHECK(sd::make_sigmas("ays", sdxl, 10)[1] == doctest::Approx(6.315));
}

TEST_CASE("zero terminal SNR moves the highest level to noise alone, and leaves the lowest where it is") {
    const auto zero = sd::NoiseSchedule::scaled_linear(sd::align_your_steps_sd1(), true);
    CHECK(zero.sigmas().front() == doctest::Approx(trained.sigmas().front()).epsilon(1e-6));
    CHECK(zero.sigmas().back() == doctest::Approx(4096).epsilon(1e-6));
    CHECK(zero.timestep(zero.sigmas().back()) == 999);
    for (size_t t = 1; t < zero.sigmas().size(); ++t) {
        CHECK(zero.sigmas()[t] > zero.sigmas()[t - 1]);
    }
    // In sqrt(alpha_bar) all levels are moved and scaled alike.
    const auto kept = [](float sigma) { return 1 / std::sqrt(1 + static_cast<double>(sigma) * sigma); };
    const double end = kept(trained.sigmas()[999]), scale = kept(trained.sigmas()[0]) / (kept(trained.sigmas()[0]) - end);
    CHECK(kept(zero.sigmas()[500]) == doctest::Approx((kept(trained.sigmas()[500]) - end) * scale).epsilon(1e-6));
}
