#include "files.h"
#include "lora_model.h"

#include <algorithm>

using namespace sd;
using namespace sd::test;

namespace {

Weight weight_of(const Shape & ne) {
    Weight weight;
    weight.name = "model.diffusion_model.x.weight";
    weight.ne = ne;
    return weight;
}

void check_case(const LoraCase & lora, const std::vector<float> & base) {
    CAPTURE(lora.name);
    const Update update = make_update(LoraModule(lora.module), [&] { return base; });
    for (const double multiplier : {0.0, 0.5, 1.0, -0.7}) {
        CAPTURE(multiplier);
        const Doubles w(base.begin(), base.end());
        const auto delta = delta_of(update, base.data(), static_cast<float>(multiplier));
        auto got = base;
        for (size_t i = 0; i < got.size(); ++i) {
            got[i] += delta[i];
        }
        // Sums of some dozens of products in f32.
        CHECK(relative_rmse(got, lora.changed(w, multiplier)) < 1e-6);
        if (multiplier == 0.0) {
            CHECK(std::all_of(delta.begin(), delta.end(), [](float value) { return value == 0.0f; }));
        }
    }
}

} // namespace

TEST_CASE("every kind of adapter changes a weight as its formula says") {
    struct Form {
        Shape ne;
        int64_t rows, inputs, kernel;
    };
    for (const Form & form : {Form{{24, 16, 1, 1}, 16, 24, 1}, Form{{1, 1, 24, 16}, 16, 24, 1},
                              Form{{3, 3, 8, 12}, 12, 8, 3}, Form{{16, 16, 1, 1}, 16, 16, 1}}) {
        const Weight weight = weight_of(form.ne);
        CAPTURE(form.ne[0]);
        std::mt19937 rng(7);
        const auto base = random_floats(rng, static_cast<size_t>(count(form.ne)), 0.2f);
        LoraCases cases({&weight, 0, form.rows}, form.rows, form.inputs, form.kernel, 11);
        for (const LoraCase & lora : cases.all()) {
            if (form.rows % 8 == 0 || lora.name != "boft") {
                check_case(lora, base);
            }
        }
    }
}

TEST_CASE("DoRA at full strength gives rows and inputs their norms") {
    const Weight weight = weight_of({20, 20, 1, 1});
    std::mt19937 rng(3);
    const auto base = random_floats(rng, 400, 0.2f);
    for (const bool of_columns : {false, true}) {
        LoraCases cases({&weight, 0, 20}, 20, 20, 1, 5);
        const LoraCase lora = cases.dora(cases.low_rank(4), of_columns);
        const Update update = make_update(LoraModule(lora.module), [&] { return base; });
        const auto delta = delta_of(update, base.data(), 1.0f);
        for (int64_t n = 0; n < 20; ++n) {
            double square = 0;
            for (int64_t k = 0; k < 20; ++k) {
                const int64_t at = of_columns ? k * 20 + n : n * 20 + k;
                square += std::pow(static_cast<double>(base[at]) + delta[at], 2);
            }
            CHECK(std::sqrt(square) ==
                  doctest::Approx(std::abs(lora.module.magnitude->data[n])).epsilon(1e-5));
        }
    }
}

TEST_CASE("parts of fused weights are their own matrices, and halves may lie the other way round") {
    const Weight weight = weight_of({24, 48, 1, 1}); // three parts of 16 rows
    std::mt19937 rng(7);
    const auto whole = random_floats(rng, 24 * 48, 0.2f);
    for (const bool swapped : {false, true}) {
        CAPTURE(swapped);
        std::vector<float> base(whole.begin() + 16 * 24, whole.begin() + 32 * 24), in_file_order = base;
        if (swapped) {
            std::rotate(in_file_order.begin(), in_file_order.begin() + 8 * 24, in_file_order.end());
        }
        LoraCases cases({&weight, 16, 16, swapped}, 16, 24, 1, 11);
        for (const LoraCase & lora : cases.all()) {
            CAPTURE(lora.name);
            const Update update = make_update(LoraModule(lora.module), [&] { return base; });
            CHECK(update.input_scale.empty());
            CHECK(update.kronecker.a.empty());
            const auto delta = delta_of(update, base.data(), 0.8f);
            auto got = base;
            Doubles want = lora.changed({in_file_order.begin(), in_file_order.end()}, 0.8);
            if (swapped) {
                std::rotate(want.begin(), want.begin() + 8 * 24, want.end());
            }
            for (size_t i = 0; i < got.size(); ++i) {
                got[i] += delta[i];
            }
            CHECK(relative_rmse(got, want) < 1e-6);
        }
    }
}

TEST_CASE("vectors and tables of embeddings take what fits them") {
    std::mt19937 rng(7);
    const Weight bias = weight_of({32, 1, 1, 1});
    LoraCases vector({&bias, 0, 32}, 32, 1, 1, 3);
    const auto b = random_floats(rng, 32, 0.2f);
    for (const LoraCase & lora : {vector.dense(), vector.replace(), vector.ia3(false)}) {
        check_case(lora, b);
    }
    Weight table = weight_of({8, 40, 1, 1});
    table.table = true;
    LoraCases rows({&table, 0, 40}, 40, 8, 1, 3);
    const auto e = random_floats(rng, 320, 0.2f);
    for (const LoraCase & lora : {rows.low_rank(2), rows.dense(), rows.lokr(2, 2, 0), rows.ia3(true)}) {
        check_case(lora, e);
        const Update update = make_update(LoraModule(lora.module), [&] { return e; });
        CHECK(update.kronecker.a.empty());
        CHECK(update.input_scale.empty());
    }
}

TEST_CASE("a LoHa of low rank is one pair, of a higher one it is dense") {
    const Weight weight = weight_of({320, 320, 1, 1});
    LoraCases cases({&weight, 0, 320}, 320, 320, 1, 3);
    CHECK(make_update(cases.loha(4, false).module, {}).rank == 16);
    CHECK(make_update(cases.loha(32, false).module, {}).rank == 0);
}

TEST_CASE("factors that do not fit are named with their sizes") {
    const Weight weight = weight_of({24, 16, 1, 1});
    LoraCases cases({&weight, 0, 16}, 16, 24, 1, 3);
    const auto complain = [&](LoraModule module) {
        return complaint([&] { make_update(std::move(module), [] { return std::vector<float>(16 * 24); }); },
                         Status::bad_file);
    };
    LoraModule short_down = cases.low_rank(2).module;
    short_down.factors["down"].data.pop_back();
    CHECK(contains(complain(short_down), "module: down has 47 elements"));
    LoraModule without_up = cases.low_rank(2).module;
    without_up.factors.erase("up");
    CHECK(contains(complain(without_up), "without its up"));
    LoraModule outside = cases.low_rank(2).module;
    outside.target.first_row = 1;
    CHECK(contains(complain(outside), "rows 1 to 17 do not lie within the 16"));
    LoraModule odd = cases.lokr(2, 4, 0).module;
    odd.factors["w1"] = {{3, 4}, std::vector<float>(12)};
    CHECK(contains(complain(odd), "divides no weight"));
    LoraModule magnitudes = cases.dora(cases.low_rank(2), false).module;
    magnitudes.magnitude->data.pop_back();
    CHECK(contains(complain(magnitudes), "15 magnitudes"));
    LoraModule blocks = cases.oft(4, 0, false).module;
    blocks.factors["blocks"].shape = {3, 4, 4};
    CHECK(contains(complain(blocks), "do not cover the 16 rows"));
}
