// A model of one layer of each sort, whose LoRAs are made in memory: their files hold nothing but a name.
#pragma once

#include "files.h"
#include "lora_cases.h"

#include "lora/lora_engine.h"
#include "nn/layers.h"
#include "nn/runner.h"

#include <ggml.h>

#include <map>
#include <memory>
#include <type_traits>

namespace sd::test {

// A GGUF file with these tensors, in these types.
class GgufWriter {
  public:
    void add(const std::string & name, const Shape & ne, DType type, const std::vector<float> & values) {
        const auto kind = static_cast<ggml_type>(type);
        std::string bytes(ggml_row_size(kind, ne[0]) * static_cast<size_t>(count(ne) / ne[0]), '\0');
        if (ggml_quantize_requires_imatrix(kind)) {
            FAIL("no such weights without an importance matrix");
        }
        ggml_quantize_chunk(kind, values.data(), bytes.data(), 0, count(ne) / ne[0], ne[0], nullptr);
        table_ += little(name.size(), 8) + name + little(4, 4);
        for (const int64_t length : ne) {
            table_ += little(static_cast<uint64_t>(length), 8);
        }
        table_ += little(static_cast<uint64_t>(type), 4) + little(data_.size(), 8);
        data_ += bytes;
        data_.resize((data_.size() + 31) / 32 * 32);
        ++tensors_;
    }

    std::string bytes() const {
        std::string head = "GGUF" + little(3, 4) + little(tensors_, 8) + little(0, 8) + table_;
        head.resize((head.size() + 31) / 32 * 32);
        return head + data_;
    }

  private:
    std::string table_, data_;
    uint64_t tensors_ = 0;
};

constexpr int64_t linear_in = 256, linear_out = 16, channels_in = 8, channels_out = 12, vocabulary = 20,
                  text_width = 32;

class LoraModel {
  public:
    explicit LoraModel(DType linear_type = DType::f32, DType kernel_type = DType::f32)
        : store(Checkpoint::open(write(folder, linear_type, kernel_type))), device("CPU", 2, "f32"),
          net(store.root("model.diffusion_model", "unet")),
          text(store.root("cond_stage_model", "text_encoder")),
          linear{net.at("linear"), linear_in, linear_out}, time{net.at("time"), linear_in, linear_out},
          conv{net.at("conv"), channels_in, channels_out, 3},
          strided{net.at("strided"), channels_in, channels_out, 3, 2},
          pointwise{net.at("pointwise"), channels_in, channels_out, 1},
          group_norm{net.at("group_norm"), channels_out, 4, 1e-5f},
          layer_norm{net.at("layer_norm"), linear_out}, tokens{text.at("tokens"), text_width, vocabulary} {
        store.check();
        store.load(device);
        runner = std::make_unique<Runner>(device, store);
    }

    // A file that means these modules.
    std::string lora(const std::string & name, std::vector<LoraModule> modules) {
        modules_[folder.write(name + ".safetensors", name)] = std::move(modules);
        return folder.path(name + ".safetensors");
    }

    std::unique_ptr<LoraEngine> engine(LoraOptions options = {}) {
        return std::make_unique<LoraEngine>(
            store, device,
            [this](const std::string & path) {
                ++reads;
                LoraFile file;
                const auto found = modules_.find(path);
                if (found == modules_.end()) {
                    fail(Status::bad_file, "%s: is no LoRA", path.c_str());
                }
                file.modules = found->second;
                file.report.path = path;
                for (const LoraModule & module : file.modules) {
                    for (const auto & [role, factor] : module.factors) {
                        file.bytes += 4 * factor.data.size();
                    }
                }
                return file;
            },
            options);
    }

    // One layer of one input, under what the engine has in force.
    template <typename Layer>
    Tensor run(const LoraEngine * lora, const Layer & layer, const Tensor & x, int step = 0, int steps = 1,
               int64_t runs = 1) {
        const Adapters * adapters = lora ? lora->adapters() : nullptr;
        runner->adapt(adapters, adapters ? lora->denoiser_strengths(step, steps, runs) : Tensor());
        return runner
            ->run("layer " + layer.here.name(), {{"x", &x}},
                  [&](Graph & g) {
                      constexpr bool picture = std::is_same_v<Layer, Conv2d> || std::is_same_v<Layer, GroupNorm>;
                      const bool ids = layer.weight->table;
                      Value in = ids ? g.input_ids("x") : g.input("x");
                      Value y = layer(g, picture ? g.picture(in) : in);
                      g.output("y", picture ? g.planes(y) : y);
                  })
            .at("y");
    }

    std::vector<float> base(const Weight * weight) const {
        std::vector<float> out(static_cast<size_t>(count(weight->ne)));
        store.read_base(*weight, 0, count(weight->ne), out.data());
        return out;
    }

    Folder folder;
    WeightStore store;
    Device device;
    std::unique_ptr<Runner> runner;
    Scope net, text;
    Linear linear, time;
    Conv2d conv, strided, pointwise;
    GroupNorm group_norm;
    LayerNorm layer_norm;
    Embedding tokens;
    int reads = 0; // of LoRA files

  private:
    static std::string write(const Folder & folder, DType linear_type, DType kernel_type) {
        std::mt19937 rng(1);
        GgufWriter file;
        const auto add = [&](const std::string & name, const Shape & ne, DType type) {
            file.add(name, ne, type, random_floats(rng, static_cast<size_t>(count(ne)), 0.2f));
        };
        const std::string net = "model.diffusion_model.";
        for (const char * name : {"linear", "time"}) {
            add(net + name + ".weight", {linear_in, linear_out, 1, 1}, linear_type);
            add(net + name + ".bias", {linear_out, 1, 1, 1}, DType::f32);
        }
        for (const char * name : {"conv", "strided", "pointwise"}) {
            const int64_t size = std::string(name) == "pointwise" ? 1 : 3;
            add(net + name + ".weight", {size, size, channels_in, channels_out}, kernel_type);
            add(net + name + ".bias", {channels_out, 1, 1, 1}, DType::f32);
        }
        for (const char * leaf : {".weight", ".bias"}) {
            add(net + "group_norm" + leaf, {channels_out, 1, 1, 1}, DType::f32);
            add(net + "layer_norm" + leaf, {linear_out, 1, 1, 1}, DType::f32);
        }
        add("cond_stage_model.tokens.weight", {text_width, vocabulary, 1, 1}, DType::f32);
        return folder.write("model.gguf", file.bytes());
    }

    std::map<std::string, std::vector<LoraModule>> modules_;
};

inline LoraCases cases_for(const Weight * weight, uint32_t seed) {
    const MatrixShape shape = matrix_shape(*weight);
    return {{weight, 0, shape.rows}, shape.rows, shape.inputs, shape.taps == 9 ? 3 : 1, seed};
}

inline LoraUse use_of(const std::string & path, double multiplier) {
    LoraUse use;
    use.path = path;
    use.text.fill(multiplier);
    use.unet = multiplier;
    return use;
}

inline LoraState state_of(std::vector<LoraUse> uses) { return {{std::move(uses)}}; }

inline double relative_rmse(const std::vector<float> & got, const Doubles & want) {
    REQUIRE(got.size() == want.size());
    double error = 0, all = 0;
    for (size_t i = 0; i < want.size(); ++i) {
        error += (got[i] - want[i]) * (got[i] - want[i]);
        all += want[i] * want[i];
    }
    return all > 0 ? std::sqrt(error / all) : std::sqrt(error);
}

} // namespace sd::test
