#include "core/error.h"
#include "sampling/rng.h"

#include <doctest/doctest.h>

#include <cmath>

static std::vector<float> draw(sd::Rng & rng, size_t n) {
    std::vector<float> out(n);
    rng.normal(out.data(), n);
    return out;
}

static void check_starts_with(const std::vector<float> & got, const std::vector<float> & want) {
    for (size_t i = 0; i < want.size(); ++i) {
        CHECK(std::fabs(got[i] - want[i]) < 5.1e-5f); // as torch prints them
    }
}

TEST_CASE("cpu noise is torch.manual_seed(0); torch.randn(n)") {
    check_starts_with(draw(*sd::make_rng("cpu", 0), 5), {1.5410f, -0.2934f, -2.1788f, 0.5684f, -1.0845f});
    check_starts_with(draw(*sd::make_rng("cpu", 0), 20), {-1.1258f, -1.1524f, -0.2506f, -0.4339f});
}

TEST_CASE("cuda noise is what torch draws on a GPU") {
    check_starts_with(draw(*sd::make_rng("cuda", 0), 20),
                      {-0.9247f, -0.4253f, -2.6438f, 0.1452f, -0.1209f, -0.5797f, -0.6229f, -0.3284f});

    const auto rng = sd::make_rng("cuda", 42); // three calls of four, as a torch test prints them
    check_starts_with(draw(*rng, 4), {0.1940f, 2.1614f, -0.1721f, 0.8491f});
    check_starts_with(draw(*rng, 4), {0.1391f, -0.1082f, -0.7174f, 0.7566f});
    check_starts_with(draw(*rng, 4), {-0.5187f, 1.2268f, 0.6255f, -0.9117f});
}

TEST_CASE("a seed's low half is all that torch's CPU generator takes; CUDA's takes the whole") {
    const uint64_t same_low_half = 5 + (uint64_t{1} << 32);
    CHECK(draw(*sd::make_rng("cpu", 5), 40) == draw(*sd::make_rng("cpu", same_low_half), 40));
    CHECK(draw(*sd::make_rng("cuda", 5), 40) != draw(*sd::make_rng("cuda", same_low_half), 40));
}

TEST_CASE("noise is normal, finite, and new in each call") {
    for (const std::string & name : sd::rng_names()) {
        const auto               rng   = sd::make_rng(name, 1);
        const std::vector<float> first = draw(*rng, 100003), second = draw(*rng, 100003);
        CHECK(first != second);
        double sum = 0, squares = 0;
        for (const float value : first) {
            REQUIRE(std::isfinite(value));
            sum     += value;
            squares += static_cast<double>(value) * value;
        }
        CHECK(std::fabs(sum / 100003) < 0.01);
        CHECK(std::fabs(squares / 100003 - 1) < 0.02);
        draw(*rng, 0);
    }
}

TEST_CASE("an unknown generator is told the known ones") {
    CHECK(sd::rng_names().front() == "cpu");
    CHECK_THROWS_WITH_AS(sd::make_rng("gpu", 0), "rng 'gpu' is not known; there are: cpu, cuda", sd::Error);
}
