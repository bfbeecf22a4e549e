#include "lora_model.h"

using namespace sd;
using namespace sd::test;

namespace {

Tensor random_tensor(const Shape & ne, uint32_t seed) {
    std::mt19937 rng(seed);
    Tensor out(ne);
    out.data = random_floats(rng, out.data.size(), 1.0f);
    return out;
}

// W x + b, in double.
Doubles linear_by_hand(const Doubles & w, const std::vector<float> & b, const Tensor & x) {
    const auto inputs = x.ne[0], outputs = static_cast<int64_t>(b.size()), n = count(x.ne) / inputs;
    Doubles y(static_cast<size_t>(n * outputs));
    for (int64_t t = 0; t < n; ++t) {
        for (int64_t o = 0; o < outputs; ++o) {
            y[t * outputs + o] = b[o];
            for (int64_t i = 0; i < inputs; ++i) {
                y[t * outputs + o] += w[o * inputs + i] * x.data[t * inputs + i];
            }
        }
    }
    return y;
}

Doubles conv_by_hand(const Doubles & w, const std::vector<float> & b, const Tensor & x, int size,
                     int stride) {
    const int64_t width = x.ne[0], height = x.ne[1], inputs = x.ne[2], images = x.ne[3], pad = size / 2;
    const int64_t to_width = (width + 2 * pad - size) / stride + 1,
                  to_height = (height + 2 * pad - size) / stride + 1;
    const auto outputs = static_cast<int64_t>(b.size());
    Doubles y(static_cast<size_t>(to_width * to_height * outputs * images));
    size_t at = 0;
    for (int64_t n = 0; n < images; ++n) {
        for (int64_t o = 0; o < outputs; ++o) {
            for (int64_t v = 0; v < to_height; ++v) {
                for (int64_t u = 0; u < to_width; ++u, ++at) {
                    y[at] = b[o];
                    for (int64_t k = 0; k < inputs * size * size; ++k) {
                        const int64_t i = k / size / size, from_v = v * stride + k / size % size - pad;
                        const int64_t from_u = u * stride + k % size - pad;
                        if (from_u >= 0 && from_u < width && from_v >= 0 && from_v < height) {
                            y[at] += w[o * inputs * size * size + k] *
                                     x.data[((n * inputs + i) * height + from_v) * width + from_u];
                        }
                    }
                }
            }
        }
    }
    return y;
}

Doubles by_hand(const Linear & layer, const Doubles & w, const std::vector<float> & b, const Tensor & x) {
    (void)layer;
    return linear_by_hand(w, b, x);
}

Doubles by_hand(const Conv2d & layer, const Doubles & w, const std::vector<float> & b, const Tensor & x) {
    return conv_by_hand(w, b, x, layer.size, layer.stride);
}

// Each kind on one layer, in the graph and in the weight, against the changed weight in double.
template <typename Layer>
void check_kinds(LoraModel & model, const Layer & layer, const Tensor & x, double tolerance) {
    const auto base = model.base(layer.weight), bias = model.base(layer.bias);
    const Doubles w(base.begin(), base.end());
    auto runtime = model.engine();
    LoraOptions merged;
    merged.mode = LoraMode::restore;
    auto restore = model.engine(merged);
    const auto clean = model.store.fingerprint();
    int number = 0;
    for (const LoraCase & lora : cases_for(layer.weight, 5).all()) {
        CAPTURE(lora.name);
        const std::string path = model.lora(layer.here.name() + std::to_string(number++), {lora.module});
        for (const double multiplier : {1.0, -0.6}) {
            CAPTURE(multiplier);
            const Doubles want = by_hand(layer, lora.changed(w, multiplier), bias, x);
            runtime->apply(state_of({use_of(path, multiplier)}));
            CHECK(model.store.fingerprint() == clean);
            CHECK(relative_rmse(model.run(runtime.get(), layer, x).data, want) < tolerance);
            restore->apply(state_of({use_of(path, multiplier)}));
            CHECK(model.store.fingerprint() != clean);
            CHECK(relative_rmse(model.run(restore.get(), layer, x).data, want) < tolerance);
            restore->apply({});
        }
    }
    CHECK(model.store.fingerprint() == clean);
}

} // namespace

TEST_CASE("each kind acts in the graph, and in the weight, as its formula says") {
    LoraModel model;
    // Running sums in f32, of 72 products and of 256, whose last digits do not cancel where the terms of a kind do.
    check_kinds(model, model.linear, random_tensor({linear_in, 5, 2, 1}, 2), 5e-6);
    check_kinds(model, model.conv, random_tensor({6, 5, channels_in, 2}, 2), 2e-6);
    check_kinds(model, model.strided, random_tensor({7, 6, channels_in, 1}, 2), 2e-6);
    check_kinds(model, model.pointwise, random_tensor({3, 4, channels_in, 2}, 2), 2e-6);
}

TEST_CASE("adapters are exact on weights of any type") {
    for (const DType type : {DType::f16, DType::bf16, DType::q8_0, DType::q4_0, DType::q4_k, DType::q6_k}) {
        CAPTURE(std::string(dtype_name(type)));
        LoraModel model(type, DType::f16);
        const Tensor x = random_tensor({linear_in, 3, 1, 1}, 4);
        const auto plain = model.run(nullptr, model.linear, x).data;
        auto runtime = model.engine();
        LoraOptions options;
        options.mode = LoraMode::restore;
        auto restore = model.engine(options);
        const auto base = model.base(model.linear.weight);
        const Doubles w(base.begin(), base.end());
        const auto lora = cases_for(model.linear.weight, 5).low_rank(4);
        const auto path = model.lora("a", {lora.module});

        // ggml multiplies by narrow weights with narrow activations; what the adapter adds to that is f32.
        const Doubles changed = lora.changed(w, 1);
        Doubles delta = changed;
        for (size_t i = 0; i < w.size(); ++i) {
            delta[i] -= w[i];
        }
        Doubles want = linear_by_hand(delta, std::vector<float>(linear_out), x);
        for (size_t i = 0; i < want.size(); ++i) {
            want[i] += plain[i];
        }
        runtime->apply(state_of({use_of(path, 1)}));
        CHECK(relative_rmse(model.run(runtime.get(), model.linear, x).data, want) < 1e-6);

        // Merged it is rounded once, to f16 where it was quantised: 2^-11, and bf16 2^-8.
        restore->apply(state_of({use_of(path, 1)}));
        const bool wide = type == DType::bf16;
        CHECK(std::string(resident_type_name(*model.linear.weight)) == (wide ? "bf16" : "f16"));
        std::vector<float> resident(w.size());
        model.store.read(*model.linear.weight, 0, static_cast<int64_t>(w.size()), resident.data());
        CHECK(relative_rmse(resident, changed) < (wide ? 2e-3 : 3e-4));
        CHECK(relative_rmse(model.run(nullptr, model.linear, x).data,
                            linear_by_hand(changed, model.base(model.linear.bias), x)) <
              (wide ? 1e-2 : 1e-3));
    }
}

TEST_CASE("a quantised weight is requantised on request, the same way each time") {
    LoraModel model(DType::q8_0);
    LoraOptions options;
    options.mode = LoraMode::restore;
    options.merge.requantise = true;
    auto engine = model.engine(options);
    const auto path = model.lora("a", {cases_for(model.linear.weight, 5).low_rank(4).module});
    const auto clean = model.store.fingerprint();
    engine->apply(state_of({use_of(path, 1)}));
    CHECK(std::string(resident_type_name(*model.linear.weight)) == "q8_0");
    const auto once = model.store.fingerprint();
    engine->apply(state_of({use_of(path, 0.5)}));
    engine->apply(state_of({use_of(path, 1)}));
    CHECK(model.store.fingerprint() == once);
    engine->apply({});
    CHECK(model.store.fingerprint() == clean);
}

TEST_CASE("biases, norms and tables of embeddings take part") {
    LoraModel model;
    std::vector<LoraModule> modules;
    const auto add = [&](const Weight * weight, uint32_t seed) {
        modules.push_back(cases_for(weight, seed).dense().module);
        return modules.back().factors.at("diff").data;
    };
    const auto linear_b = add(model.linear.bias, 1), conv_b = add(model.conv.bias, 2);
    add(model.group_norm.weight, 3);
    add(model.group_norm.bias, 4);
    add(model.layer_norm.weight, 5);
    add(model.layer_norm.bias, 6);
    const LoraCase table = cases_for(model.tokens.weight, 7).low_rank(3);
    modules.push_back(table.module);
    modules.push_back(cases_for(model.tokens.weight, 8).ia3(true).module);
    const auto path = model.lora("a", modules);
    const auto state = state_of({use_of(path, 0.5)});
    auto runtime = model.engine();
    LoraOptions options;
    options.mode = LoraMode::restore;
    auto restore = model.engine(options);

    const Tensor tokens = random_tensor({linear_in, 3, 2, 1}, 2),
                 narrow = random_tensor({linear_out, 3, 2, 1}, 3);
    const Tensor image = random_tensor({4, 3, channels_in, 2}, 4),
                 wide = random_tensor({4, 3, channels_out, 2}, 5);
    Tensor ids({4, 2, 1, 1});
    ids.data = {0, 3, 19, 3, 1, 2, 4, 18};
    const auto all = [&](const LoraEngine * engine) {
        std::vector<std::vector<float>> out;
        out.push_back(model.run(engine, model.linear, tokens).data);
        out.push_back(model.run(engine, model.conv, image).data);
        out.push_back(model.run(engine, model.group_norm, wide).data);
        out.push_back(model.run(engine, model.layer_norm, narrow).data);
        out.push_back(model.run(engine, model.tokens, ids).data);
        return out;
    };
    const auto plain = all(nullptr);
    runtime->apply(state);
    const auto in_graph = all(runtime.get());
    restore->apply(state);
    const auto in_weights = all(nullptr);
    for (size_t i = 0; i < plain.size(); ++i) {
        CAPTURE(i);
        CHECK(relative_rmse(in_graph[i], {in_weights[i].begin(), in_weights[i].end()}) < 1e-6);
        CHECK(relative_rmse(in_graph[i], {plain[i].begin(), plain[i].end()}) > 1e-2);
    }
    CHECK(in_graph[0][0] == doctest::Approx(plain[0][0] + 0.5 * linear_b[0]).epsilon(1e-4));
    CHECK(in_graph[1][0] == doctest::Approx(plain[1][0] + 0.5 * conv_b[0]).epsilon(1e-4));
    restore->apply({});
}

TEST_CASE("many adapters on one weight are one pair, and their order means nothing") {
    LoraModel model;
    const Tensor x = random_tensor({linear_in, 4, 1, 1}, 2), image = random_tensor({5, 5, channels_in, 1}, 3);
    std::vector<LoraUse> uses;
    Doubles w, kernel;
    for (const float value : model.base(model.linear.weight)) {
        w.push_back(value);
    }
    for (const float value : model.base(model.conv.weight)) {
        kernel.push_back(value);
    }
    const Doubles w0 = w, kernel0 = kernel;
    const auto add = [](Doubles & sum, const Doubles & changed, const Doubles & base) {
        for (size_t i = 0; i < sum.size(); ++i) {
            sum[i] += changed[i] - base[i];
        }
    };
    for (uint32_t i = 0; i < 6; ++i) {
        LoraCases linear = cases_for(model.linear.weight, 10 + i),
                  conv = cases_for(model.conv.weight, 20 + i);
        const LoraCase a = i == 4   ? linear.dora(linear.low_rank(2), true)
                           : i == 5 ? linear.ia3(false)
                                    : linear.low_rank(1 + i);
        const LoraCase b = i == 4   ? conv.dora(conv.low_rank(2), false)
                           : i == 5 ? conv.ia3(true)
                                    : conv.low_rank(1 + i);
        const double multiplier = 0.3 * (i + 1) - 0.8;
        uses.push_back(use_of(model.lora("l" + std::to_string(i), {a.module, b.module}), multiplier));
        add(w, a.changed(w0, multiplier), w0);
        add(kernel, b.changed(kernel0, multiplier), kernel0);
    }
    auto engine = model.engine();
    engine->apply(state_of(uses));
    const Adapter & adapter = *engine->adapters()->find(model.linear.weight);
    CHECK(adapter.up->ne[0] == 1 + 2 + 3 + 4 + 2);
    CHECK(adapter.dense.empty());
    const Tensor y = model.run(engine.get(), model.linear, x), z = model.run(engine.get(), model.conv, image);
    CHECK(relative_rmse(y.data, linear_by_hand(w, model.base(model.linear.bias), x)) < 2e-6);
    CHECK(relative_rmse(z.data, conv_by_hand(kernel, model.base(model.conv.bias), image, 3, 1)) < 2e-6);

    auto other = model.engine();
    LoraOptions options;
    options.mode = LoraMode::restore;
    auto merged = model.engine(options);
    merged->apply(state_of(uses));
    const auto fingerprint = model.store.fingerprint();
    CHECK(relative_rmse(model.run(nullptr, model.linear, x).data, {y.data.begin(), y.data.end()}) < 2e-6);
    merged->apply({});
    std::mt19937 rng(4);
    for (int i = 0; i < 5; ++i) {
        std::shuffle(uses.begin(), uses.end(), rng);
        other->apply(state_of(uses));
        CHECK(model.run(other.get(), model.linear, x).data == y.data);
        CHECK(model.run(other.get(), model.conv, image).data == z.data);
        merged->apply(state_of(uses));
        CHECK(model.store.fingerprint() == fingerprint);
        merged->apply({});
    }
}

TEST_CASE("each image of a batch may have its own") {
    LoraModel model;
    const auto a = model.lora("a", {cases_for(model.linear.weight, 1).low_rank(2).module,
                                    cases_for(model.linear.bias, 2).dense().module,
                                    cases_for(model.conv.weight, 3).boft(2, 2).module,
                                    cases_for(model.time.weight, 4).ia3(false).module});
    const auto b = model.lora("b", {cases_for(model.linear.weight, 5).lokr(4, 2, 0).module,
                                    cases_for(model.conv.weight, 6).low_rank(3).module,
                                    cases_for(model.conv.bias, 7).dense().module,
                                    cases_for(model.time.weight, 8).low_rank(2).module,
                                    cases_for(model.time.bias, 8).dense().module});
    const std::vector<std::vector<LoraUse>> images{{use_of(a, 0.7)}, {}, {use_of(a, -0.5), use_of(b, 1)}};
    auto batch = model.engine(), single = model.engine();
    batch->apply({images});
    const Tensor x = random_tensor({linear_in, 4, 3, 1}, 2), image = random_tensor({5, 5, channels_in, 3}, 3);
    const Tensor time = random_tensor({linear_in, 3, 1, 1}, 4);
    const auto y = model.run(batch.get(), model.linear, x, 0, 1, 3).data,
               z = model.run(batch.get(), model.conv, image, 0, 1, 3).data;
    const auto t = model.run(batch.get(), model.time, time, 0, 1, 3).data;
    const auto part = [](const Tensor & of, const Shape & ne, size_t i) {
        Tensor out(ne);
        std::copy_n(of.data.begin() + static_cast<std::ptrdiff_t>(i * out.data.size()), out.data.size(),
                    out.data.begin());
        return out;
    };
    const auto same = [&](const std::vector<float> & whole, const Tensor & one, size_t i) {
        const auto from = whole.begin() + static_cast<std::ptrdiff_t>(i * one.data.size());
        CHECK(relative_rmse({from, from + static_cast<std::ptrdiff_t>(one.data.size())},
                            {one.data.begin(), one.data.end()}) < 1e-6);
    };
    for (size_t i = 0; i < images.size(); ++i) {
        CAPTURE(i);
        single->apply(state_of(images[i]));
        same(y, model.run(single.get(), model.linear, part(x, {linear_in, 4, 1, 1}, i)), i);
        same(z, model.run(single.get(), model.conv, part(image, {5, 5, channels_in, 1}, i)), i);
        same(t, model.run(single.get(), model.time, part(time, {linear_in, 1, 1, 1}, i)), i);
    }
    // With guidance each image runs twice.
    Tensor twice({linear_in, 4, 6, 1});
    std::copy(x.data.begin(), x.data.end(), twice.data.begin());
    std::copy(x.data.begin(), x.data.end(), twice.data.begin() + static_cast<std::ptrdiff_t>(x.data.size()));
    const auto guided = model.run(batch.get(), model.linear, twice, 0, 1, 6).data;
    CHECK(std::equal(y.begin(), y.end(), guided.begin()));
    CHECK(std::equal(y.begin(), y.end(), guided.begin() + static_cast<std::ptrdiff_t>(y.size())));
}

TEST_CASE("ranges of steps and weights of blocks") {
    LoraModel model;
    const auto a = model.lora("a", {cases_for(model.linear.weight, 1).low_rank(2).module,
                                    cases_for(model.conv.weight, 3).boft(2, 2).module,
                                    cases_for(model.tokens.weight, 3).low_rank(2).module});
    const Tensor x = random_tensor({linear_in, 4, 1, 1}, 2), image = random_tensor({5, 5, channels_in, 1}, 3);
    auto engine = model.engine(), half = model.engine();
    LoraUse late = use_of(a, 0.5), early = use_of(a, 1);
    late.start = 0.7;
    early.stop = 0.7;
    half->apply(state_of({use_of(a, 0.5)}));
    engine->apply(state_of({late, early}));
    const auto weak = model.run(half.get(), model.linear, x).data,
               weak_image = model.run(half.get(), model.conv, image).data;
    half->apply(state_of({use_of(a, 1)}));
    const auto full = model.run(half.get(), model.linear, x).data,
               full_image = model.run(half.get(), model.conv, image).data;
    for (int step = 0; step < 10; ++step) {
        CAPTURE(step);
        CHECK(model.run(engine.get(), model.linear, x, step, 10).data == (step < 7 ? full : weak));
        CHECK(model.run(engine.get(), model.conv, image, step, 10).data ==
              (step < 7 ? full_image : weak_image));
    }
    // The text encoder runs once and takes their sum.
    const Tensor strengths = engine->text_strengths(0);
    const auto first = engine->adapters()->find(model.tokens.weight)->strengths;
    CHECK(strengths.data[static_cast<size_t>(first)] == 1.5f);

    LoraUse blocks = use_of(a, 2);
    blocks.blocks = {
        {"model.diffusion_model", 0.0}, {"unet.linear", 0.5}, {"unet.lin", 9}, {"text_encoder", 0}};
    engine->apply(state_of({blocks}));
    CHECK(model.run(engine.get(), model.linear, x).data == full);
    CHECK(engine->adapters()->find(model.conv.weight) == nullptr);
    CHECK(engine->adapters()->find(model.tokens.weight) == nullptr);
}

TEST_CASE(
    "a change of multiplier is new numbers, a change of the set new tensors, of which dense ones are kept") {
    LoraModel model;
    const auto a = model.lora("a", {cases_for(model.linear.weight, 1).low_rank(2).module});
    const auto b = model.lora("b", {cases_for(model.conv.weight, 2).dense().module});
    auto engine = model.engine();
    CHECK(engine->adapters() == nullptr);
    CHECK(engine->apply(state_of({use_of(a, 1)})));
    const uint64_t id = engine->adapters()->id;
    CHECK(engine->apply(state_of({use_of(a, 0.25)})));
    CHECK(engine->adapters()->id == id);
    CHECK_FALSE(engine->apply(state_of({use_of(a, 0.25)})));
    CHECK(engine->apply(state_of({use_of(a, 0.25), use_of(b, 1)})));
    CHECK(engine->adapters()->id != id);
    const auto * delta = engine->adapters()->find(model.conv.weight)->dense[0].delta;
    CHECK(engine->apply(state_of({use_of(b, 1)})));
    CHECK(engine->adapters()->find(model.conv.weight)->dense[0].delta == delta);
    CHECK(engine->apply({}));
    CHECK(engine->adapters() == nullptr);
    CHECK_FALSE(engine->apply({}));
    CHECK(model.reads == 2);
}
