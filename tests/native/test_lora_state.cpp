#include "lora_model.h"

#include <algorithm>
#include <limits>

using namespace sd;
using namespace sd::test;

namespace {

std::string change_of(const LoraChange & change) {
    return text("%s %g %g", change.use.path.c_str(), change.use.text[0], change.use.unet);
}

std::vector<std::string> diff(const LoraState & current, const LoraState & wanted) {
    std::vector<std::string> out;
    for (const LoraChange & change : lora_state_diff(canonical(current), canonical(wanted))) {
        out.push_back(change_of(change));
    }
    return out;
}

using Texts = std::vector<std::string>;

LoraOptions merging(LoraMode mode) {
    LoraOptions options;
    options.mode = mode;
    return options;
}

// Three files that touch weights of every sort, two of them the same ones.
std::vector<std::string> some_loras(LoraModel & model) {
    return {model.lora("a", {cases_for(model.linear.weight, 1).low_rank(3).module,
                             cases_for(model.conv.weight, 2).loha(5, false).module,
                             cases_for(model.tokens.weight, 3).low_rank(2).module}),
            model.lora("b", {cases_for(model.linear.weight, 4).boft(2, 2).module,
                             cases_for(model.conv.bias, 5).dense().module,
                             cases_for(model.strided.weight, 6).glora(2).module}),
            model.lora("c", {cases_for(model.linear.weight, 7).lokr(2, 4, 1).module,
                             cases_for(model.layer_norm.weight, 8).dense().module,
                             cases_for(model.conv.weight, 9).ia3(true).module})};
}

} // namespace

TEST_CASE("what a prompt drops is taken away, and what stays is not touched") {
    const LoraState ab = state_of({use_of("b", 1), use_of("a", 0.5)});
    CHECK(diff({}, ab) == Texts{"a 0.5 0.5", "b 1 1"});
    CHECK(diff(ab, ab).empty());
    CHECK(diff(ab, state_of({use_of("a", 0.5), use_of("b", 1)})).empty());
    CHECK(diff(ab, state_of({use_of("b", 1.25), use_of("c", -1)})) ==
          Texts{"a -0.5 -0.5", "b 0.25 0.25", "c -1 -1"});
    CHECK(diff(ab, {}) == Texts{"a -0.5 -0.5", "b -1 -1"});
    CHECK(diff(ab, state_of({use_of("a", 0.5), use_of("b", 0.5), use_of("b", 0.5)})).empty());
    CHECK(diff(ab, state_of({use_of("a", 0.5), use_of("b", 1), use_of("c", 0)})).empty());

    LoraUse late = use_of("a", 0.5);
    late.start = 0.5;
    CHECK(diff(state_of({use_of("a", 0.5)}), state_of({late})) == Texts{"a -0.5 -0.5", "a 0.5 0.5"});
    const LoraState batch{{{use_of("a", 1)}, {use_of("b", 1)}}};
    CHECK(diff(state_of({use_of("a", 1)}), batch) == Texts{"a -1 -1", "b 1 1"});
    CHECK(canonical({{{use_of("a", 1)}, {use_of("a", 1)}}}).images.size() == 1);
}

TEST_CASE("multipliers are finite numbers, and steps are ranges") {
    const auto wrong = [](LoraUse use) {
        return complaint([&] { canonical(state_of({use})); }, Status::bad_argument);
    };
    CHECK(contains(wrong(use_of("x.safetensors", std::nan(""))),
                   "x.safetensors: its multiplier for the text encoder is nan"));
    CHECK(contains(wrong(use_of("x", std::numeric_limits<double>::infinity())), "inf"));
    CHECK(contains(wrong(use_of("x", 1e300)), "1e+300"));
    LoraUse use = use_of("x", 1);
    use.start = 0.6;
    use.stop = 0.4;
    CHECK(contains(wrong(use), "steps from 0.6 to 0.4 are no range"));
    use.start = std::nan("");
    CHECK(contains(wrong(use), "no range"));
    use = use_of("x", 1);
    use.blocks = {{"IN04", std::nan("")}};
    CHECK(contains(wrong(use), "weight of block 'IN04' is nan"));
    CHECK(contains(
        complaint([] { canonical(state_of({use_of("x", 3e38), use_of("x", 3e38)})); }, Status::bad_argument),
        "6e+38"));
}

TEST_CASE("any history leaves the bytes of a fresh model in the same state") {
    for (const DType type :
         {DType::f32, DType::f16, DType::bf16, DType::q8_0, DType::q4_0, DType::q4_k, DType::q6_k}) {
        CAPTURE(std::string(dtype_name(type)));
        LoraModel model(type, DType::f16), fresh(type, DType::f16);
        const auto paths = some_loras(model), same_paths = some_loras(fresh);
        const auto clean = model.store.fingerprint();
        auto engine = model.engine(merging(LoraMode::restore));
        std::mt19937 rng(3);
        REQUIRE(fresh.store.fingerprint() == clean);
        for (int i = 0; i < 20; ++i) {
            std::vector<LoraUse> uses, same;
            for (int k = static_cast<int>(rng() % 4); k > 0; --k) {
                const size_t which = rng() % paths.size();
                LoraUse use = use_of(paths[which], static_cast<double>(rng() % 9) / 4 - 1);
                use.text.fill(static_cast<double>(rng() % 3) / 2);
                uses.push_back(use);
                use.path = same_paths[which];
                same.insert(same.begin(), use);
            }
            engine->apply(state_of(uses));
            auto other = fresh.engine(merging(LoraMode::restore));
            other->apply(state_of(same));
            CHECK(model.store.fingerprint() == fresh.store.fingerprint());
            other->reset();
            CHECK(fresh.store.fingerprint() == clean);
        }
        engine->apply({});
        CHECK(model.store.fingerprint() == clean);
        CHECK(engine->drift() == 0);
    }
}

TEST_CASE("with differences rounding accumulates, is measured, and a reset ends it") {
    for (const DType type : {DType::f32, DType::f16, DType::q4_0}) {
        CAPTURE(std::string(dtype_name(type)));
        LoraModel model(type, type == DType::f32 ? DType::f32 : DType::f16);
        const auto paths = some_loras(model);
        const auto clean = model.store.fingerprint();
        auto engine = model.engine(merging(LoraMode::diff));
        CHECK(engine->drift() == 0);
        for (int i = 0; i < 50; ++i) {
            engine->apply(state_of({use_of(paths[i % 3], 0.7), use_of(paths[(i + 1) % 3], -0.4)}));
        }
        CHECK(engine->drift() > 0);
        CHECK(engine->drift() < (type == DType::f32 ? 1e-5 : 1e-2));
        engine->apply({});
        CHECK(engine->drift() > 0);
        CHECK(engine->drift() < 1e-2);
        engine->reset();
        CHECK(model.store.fingerprint() == clean);
        CHECK(engine->drift() == 0);
    }
}

TEST_CASE("what cannot be applied leaves weights and state as they were") {
    for (const LoraMode mode : {LoraMode::runtime, LoraMode::restore, LoraMode::diff}) {
        CAPTURE(static_cast<int>(mode));
        LoraModel model(DType::f16);
        const auto paths = some_loras(model);
        auto engine = model.engine(merging(mode));
        engine->apply(state_of({use_of(paths[0], 0.5), use_of(paths[1], 1)}));
        const auto before = model.store.fingerprint();
        const LoraState state = engine->state();
        const Adapters * adapters = engine->adapters();
        const auto unchanged = [&] {
            CHECK(model.store.fingerprint() == before);
            CHECK(engine->state() == state);
            CHECK(engine->adapters() == adapters);
        };
        const auto wrong = [&](std::vector<LoraUse> uses, Status status) {
            const std::string why = complaint([&] { engine->apply(state_of(std::move(uses))); }, status);
            CHECK(why != "");
            unchanged();
            return why;
        };
        const std::string no_lora = model.folder.write("notes.txt", "x");
        CHECK(contains(wrong({use_of(paths[2], 1), use_of(no_lora, 1)}, Status::bad_file),
                       "notes.txt: is no LoRA"));
        CHECK(contains(wrong({use_of(paths[2], 1), use_of(model.folder.path("gone"), 1)}, Status::io),
                       "gone: cannot be opened"));
        CHECK(contains(wrong({use_of(paths[2], std::nan(""))}, Status::bad_argument), "nan"));
        LoraModule misfit = cases_for(model.linear.weight, 1).low_rank(2).module;
        misfit.factors["up"].data.pop_back();
        CHECK(contains(
            wrong({use_of(paths[2], 1), use_of(model.lora("misfit", {misfit}), 1)}, Status::bad_file),
            "misfit.safetensors: module: up has 31 elements"));
        if (mode != LoraMode::runtime) {
            CHECK(contains(wrong({use_of(paths[2], 1), use_of(paths[0], 1e30)}, Status::bad_argument),
                           "its type ends at 65504"));
            LoraUse late = use_of(paths[2], 1);
            late.start = 0.5;
            CHECK(contains(wrong({late}, Status::bad_argument), "lora_mode 'runtime'"));
            CHECK(contains(
                complaint([&] { engine->apply({{{use_of(paths[0], 1)}, {}}}); }, Status::bad_argument),
                "each of 2 images"));
            unchanged();
        }
        CHECK(engine->apply(state_of({use_of(paths[2], 1)})));
    }
}

TEST_CASE("a file is read once, and again when it has changed") {
    LoraModel model;
    const auto paths = some_loras(model);
    LoraOptions options;
    options.cache_bytes = 0; // keeps the newest only, and those in use
    auto engine = model.engine(options);
    engine->apply(state_of({use_of(paths[0], 1), use_of(paths[1], 1)}));
    engine->apply(state_of({use_of(paths[0], 1), use_of(paths[1], 0.5)}));
    CHECK(model.reads == 2);
    CHECK_FALSE(
        engine->apply(state_of({use_of(model.folder.path("./a.safetensors"), 1), use_of(paths[1], 0.5)})));
    engine->apply(state_of({use_of(paths[2], 1)}));
    engine->apply(state_of({use_of(paths[0], 1)}));
    CHECK(model.reads == 4);

    const uint64_t id = engine->adapters()->id;
    model.folder.write("a.safetensors", "of another size");
    CHECK(engine->apply(state_of({use_of(paths[0], 1)})));
    CHECK(model.reads == 5);
    CHECK(engine->adapters()->id != id);
    std::filesystem::remove(paths[0]);
    CHECK(contains(complaint([&] { engine->apply(state_of({use_of(paths[0], 1)})); }, Status::io),
                   "cannot be opened"));
    CHECK(engine->adapters() != nullptr);
}

TEST_CASE("ten thousand names of one LoRA are one") {
    LoraModel model;
    const auto paths = some_loras(model);
    std::vector<LoraUse> uses(10000, use_of(paths[0], 0.125));
    auto engine = model.engine();
    engine->apply(state_of(uses));
    REQUIRE(engine->state().images.at(0).size() == 1);
    CHECK(engine->state().images[0][0].unet == 1250);
    CHECK(model.reads == 1);
}

TEST_CASE("text encoders have an identity of their own") {
    LoraModel model;
    const auto paths = some_loras(model);
    auto engine = model.engine();
    engine->apply(state_of({use_of(paths[0], 1), use_of(paths[1], 1)}));
    const std::string identity = engine->text_identity(0);
    CHECK(identity != "");
    engine->apply(state_of({use_of(paths[0], 1), use_of(paths[1], 0.5)})); // touches no text encoder
    CHECK(engine->text_identity(0) == identity);
    LoraUse use = use_of(paths[0], 0.5);
    use.text.fill(1);
    engine->apply(state_of({use}));
    CHECK(engine->text_identity(0) == identity);
    use.text[first_encoder] = 0.5;
    engine->apply(state_of({use}));
    CHECK(engine->text_identity(0) != identity);
    engine->apply({});
    CHECK(engine->text_identity(0) == "");
}
