// LoRA files for tests, and the declared weights of models that they are for. The names of the models are
// made from the tables of their papers' code, not from our networks.
#pragma once

#include "files.h"

#include "core/half.h"
#include "lora/lora_file.h"

#include <cstring>
#include <deque>
#include <functional>

namespace sd::test {

// A safetensors file in the making. Values are small, different, and of either sign.
class LoraWriter {
  public:
    using Dims = std::vector<int64_t>;

    LoraWriter & add(const std::string & name, const Dims & shape) {
        std::vector<float> values(static_cast<size_t>(elements(shape)));
        for (float & value : values) {
            next_ = next_ * 1664525u + 1013904223u;
            value = static_cast<float>(static_cast<int>(next_ >> 24) - 128) / 256;
        }
        return add(name, shape, values);
    }

    LoraWriter & add(const std::string & name, const Dims & shape, const std::vector<float> & values) {
        return add(name, "F32", shape,
                   std::string(reinterpret_cast<const char *>(values.data()), 4 * values.size()));
    }

    LoraWriter & add(const std::string & name, const char * dtype, const Dims & shape,
                     const std::string & bytes) {
        std::string dims;
        for (const int64_t n : shape) {
            dims += (dims.empty() ? "" : ",") + std::to_string(n);
        }
        header_ += (header_.empty() ? "" : ",") + std::string("\"") + name + "\":{\"dtype\":\"" + dtype +
                   "\",\"shape\":[" + dims + "],\"data_offsets\":[" + std::to_string(data_.size()) + "," +
                   std::to_string(data_.size() + bytes.size()) + "]}";
        data_ += bytes;
        return *this;
    }

    // A pair of kohya's, with an alpha where one is given.
    LoraWriter & kohya(const std::string & stem, const Dims & down, const Dims & up, double alpha = 0) {
        add(stem + ".lora_down.weight", down).add(stem + ".lora_up.weight", up);
        return alpha == 0 ? *this : add(stem + ".alpha", {}, {static_cast<float>(alpha)});
    }

    LoraWriter & peft(const std::string & stem, const Dims & a, const Dims & b) {
        return add(stem + ".lora_A.weight", a).add(stem + ".lora_B.weight", b);
    }

    // `value` is JSON already: a string in quotes.
    LoraWriter & metadata(const std::string & key, const std::string & value) {
        metadata_ += (metadata_.empty() ? "\"" : ",\"") + key + "\":" + value;
        return *this;
    }

    std::string bytes() const {
        const std::string begin = metadata_.empty() ? "{" : "{\"__metadata__\":{" + metadata_ + "},";
        return safetensors(begin + header_ + "}", data_);
    }

  private:
    static int64_t elements(const Dims & shape) {
        int64_t out = 1;
        for (const int64_t n : shape) {
            out *= n;
        }
        return out;
    }

    std::string header_, data_, metadata_;
    uint32_t next_ = 1;
};

inline std::string raw(const void * data, size_t bytes) { return {static_cast<const char *>(data), bytes}; }

// A list of declared weights that no file stands behind.
class Names {
  public:
    using Parts = std::vector<WeightPart>;

    // Roots of the original and the diffusers layout, for what follows.
    Names & root(const std::string & orig, const std::string & hf) {
        orig_ = orig;
        hf_ = hf;
        return *this;
    }
    Names & linear(const std::string & orig, const std::string & hf, int64_t out, int64_t in,
                   bool bias = true) {
        put(orig, hf, ".weight", {in, out, 1, 1});
        return bias ? put(orig, hf, ".bias", {out, 1, 1, 1}) : *this;
    }
    Names & conv(const std::string & orig, const std::string & hf, int64_t out, int64_t in, int64_t size) {
        put(orig, hf, ".weight", {size, size, in, out});
        return put(orig, hf, ".bias", {out, 1, 1, 1});
    }
    Names & norm(const std::string & orig, const std::string & hf, int64_t width) {
        put(orig, hf, ".weight", {width, 1, 1, 1});
        return put(orig, hf, ".bias", {width, 1, 1, 1});
    }
    // One parameter whose names are given whole.
    Names & bare(const std::string & orig, const std::string & hf, const Shape & ne) {
        return put(orig, hf, "", ne);
    }

    // A fused matrix; of each part its diffusers name, its rows, and whether its halves are swapped.
    Names & fused(const std::string & orig, int64_t in,
                  const std::vector<std::pair<std::string, int64_t>> & parts, bool swap = false,
                  const std::string & weight = ".weight", const std::string & bias = ".bias") {
        int64_t rows = 0;
        Parts weights, biases;
        for (const auto & [hf, n] : parts) {
            weights.push_back({hf_ + hf + ".weight", rows, n, swap});
            biases.push_back({hf_ + hf + ".bias", rows, n, swap});
            rows += n;
        }
        put(orig, "", weight, {in, rows, 1, 1}).list.back().parts = weights;
        put(orig, "", bias, {rows, 1, 1, 1}).list.back().parts = biases;
        return *this;
    }

    std::deque<Weight> list;

  private:
    Names & put(const std::string & orig, const std::string & hf, const std::string & leaf,
                const Shape & ne) {
        Weight weight{};
        weight.name = orig_ + orig + leaf;
        weight.diffusers = hf.empty() ? "" : hf_ + hf + leaf;
        weight.ne = ne;
        list.push_back(weight);
        return *this;
    }

    std::string orig_, hf_;
};

inline std::string at(const std::string & pattern, int i, int j = 0) {
    std::string out;
    for (const char c : pattern) {
        out += c == '#' ? std::to_string(i) : c == '@' ? std::to_string(j) : std::string(1, c);
    }
    return out;
}

// ---- UNets ---------------------------------------------------------------------------------------------

struct UnetPlan {
    std::vector<int64_t> widths;
    std::vector<int> depths; // of the transformer at each level; 0: none
    int64_t context;
    bool conv_proj, added;
    int64_t channels = 4;
};

inline void add_resnet(Names & names, const std::string & orig, const std::string & hf, int64_t in,
                       int64_t out, int64_t time) {
    names.norm(orig + ".in_layers.0", hf + ".norm1", in)
        .conv(orig + ".in_layers.2", hf + ".conv1", out, in, 3);
    names.linear(orig + ".emb_layers.1", hf + ".time_emb_proj", out, time);
    names.norm(orig + ".out_layers.0", hf + ".norm2", out)
        .conv(orig + ".out_layers.3", hf + ".conv2", out, out, 3);
    if (in != out) {
        names.conv(orig + ".skip_connection", hf + ".conv_shortcut", out, in, 1);
    }
}

inline void add_transformer(Names & names, const std::string & orig, const std::string & hf, int64_t width,
                            int depth, const UnetPlan & plan) {
    const auto both = [&](const std::string & path, auto add) { add(orig + path, hf + path); };
    both(".norm", [&](auto o, auto h) { names.norm(o, h, width); });
    for (const char * proj : {".proj_in", ".proj_out"}) {
        both(proj, [&](auto o, auto h) {
            plan.conv_proj ? names.conv(o, h, width, width, 1) : names.linear(o, h, width, width);
        });
    }
    for (int t = 0; t < depth; ++t) {
        const std::string block = at(".transformer_blocks.#", t);
        for (const char * attention : {".attn1", ".attn2"}) {
            const int64_t in = attention == std::string(".attn2") ? plan.context : width;
            both(block + attention + ".to_q",
                 [&](auto o, auto h) { names.linear(o, h, width, width, false); });
            both(block + attention + ".to_k", [&](auto o, auto h) { names.linear(o, h, width, in, false); });
            both(block + attention + ".to_v", [&](auto o, auto h) { names.linear(o, h, width, in, false); });
            both(block + attention + ".to_out.0", [&](auto o, auto h) { names.linear(o, h, width, width); });
        }
        both(block + ".ff.net.0.proj", [&](auto o, auto h) { names.linear(o, h, 8 * width, width); });
        both(block + ".ff.net.2", [&](auto o, auto h) { names.linear(o, h, width, 4 * width); });
        for (const char * norm : {".norm1", ".norm2", ".norm3"}) {
            both(block + norm, [&](auto o, auto h) { names.norm(o, h, width); });
        }
    }
}

inline void add_unet(Names & names, const UnetPlan & plan) {
    names.root("model.diffusion_model.", "unet.");
    const int64_t base = plan.widths[0], time = 4 * base;
    const int levels = static_cast<int>(plan.widths.size());
    names.linear("time_embed.0", "time_embedding.linear_1", time, base)
        .linear("time_embed.2", "time_embedding.linear_2", time, time);
    if (plan.added) {
        names.linear("label_emb.0.0", "add_embedding.linear_1", time, 2816)
            .linear("label_emb.0.2", "add_embedding.linear_2", time, time);
    }
    names.conv("input_blocks.0.0", "conv_in", base, plan.channels, 3);
    std::vector<int64_t> skips{base};
    int64_t width = base;
    for (int i = 0; i < levels; ++i) {
        for (int j = 0; j < 2; ++j) {
            const std::string block = at("input_blocks.#", 3 * i + j + 1);
            add_resnet(names, block + ".0", at("down_blocks.#.resnets.@", i, j), width, plan.widths[i], time);
            width = plan.widths[i];
            if (plan.depths[i] > 0) {
                add_transformer(names, block + ".1", at("down_blocks.#.attentions.@", i, j), width,
                                plan.depths[i], plan);
            }
            skips.push_back(width);
        }
        if (i + 1 < levels) {
            names.conv(at("input_blocks.#.0.op", 3 * (i + 1)), at("down_blocks.#.downsamplers.0.conv", i),
                       width, width, 3);
            skips.push_back(width);
        }
    }
    add_resnet(names, "middle_block.0", "mid_block.resnets.0", width, width, time);
    add_transformer(names, "middle_block.1", "mid_block.attentions.0", width, std::max(1, plan.depths.back()),
                    plan);
    add_resnet(names, "middle_block.2", "mid_block.resnets.1", width, width, time);
    for (int i = 0; i < levels; ++i) {
        const int level = levels - 1 - i;
        for (int j = 0; j < 3; ++j) {
            const std::string block = at("output_blocks.#", 3 * i + j);
            add_resnet(names, block + ".0", at("up_blocks.#.resnets.@", i, j), width + skips.back(),
                       plan.widths[level], time);
            skips.pop_back();
            width = plan.widths[level];
            if (plan.depths[level] > 0) {
                add_transformer(names, block + ".1", at("up_blocks.#.attentions.@", i, j), width,
                                plan.depths[level], plan);
            }
            if (j == 2 && level > 0) {
                names.conv(block + (plan.depths[level] > 0 ? ".2.conv" : ".1.conv"),
                           at("up_blocks.#.upsamplers.0.conv", i), width, width, 3);
            }
        }
    }
    names.norm("out.0", "conv_norm_out", base).conv("out.2", "conv_out", 4, base, 3);
}

// ---- text encoders -------------------------------------------------------------------------------------

inline void add_clip(Names & names, const std::string & orig, const std::string & hf, int64_t width,
                     int layers) {
    names.root(orig, hf);
    const auto same = [&](const std::string & path) { return std::make_pair(path, path); };
    names.bare("text_model.embeddings.token_embedding.weight", "text_model.embeddings.token_embedding.weight",
               {width, 49408, 1, 1});
    for (int i = 0; i < layers; ++i) {
        const std::string layer = at("text_model.encoder.layers.#", i);
        for (const char * proj : {"q", "k", "v", "out"}) {
            const auto [o, h] = same(layer + ".self_attn." + proj + "_proj");
            names.linear(o, h, width, width);
        }
        names.linear(layer + ".mlp.fc1", layer + ".mlp.fc1", 4 * width, width);
        names.linear(layer + ".mlp.fc2", layer + ".mlp.fc2", width, 4 * width);
        names.norm(layer + ".layer_norm1", layer + ".layer_norm1", width);
        names.norm(layer + ".layer_norm2", layer + ".layer_norm2", width);
    }
    names.norm("text_model.final_layer_norm", "text_model.final_layer_norm", width);
}

inline void add_open_clip(Names & names, const std::string & orig, const std::string & hf, int64_t width,
                          int layers) {
    names.root(orig, hf);
    for (int i = 0; i < layers; ++i) {
        const std::string from = at("text_model.encoder.layers.#", i), to = at("transformer.resblocks.#", i);
        names.fused(to + ".attn.in_proj", width,
                    {{from + ".self_attn.q_proj", width},
                     {from + ".self_attn.k_proj", width},
                     {from + ".self_attn.v_proj", width}},
                    false, "_weight", "_bias");
        names.linear(to + ".attn.out_proj", from + ".self_attn.out_proj", width, width);
        names.linear(to + ".mlp.c_fc", from + ".mlp.fc1", 4 * width, width);
        names.linear(to + ".mlp.c_proj", from + ".mlp.fc2", width, 4 * width);
        names.norm(to + ".ln_1", from + ".layer_norm1", width)
            .norm(to + ".ln_2", from + ".layer_norm2", width);
    }
    names.norm("ln_final", "text_model.final_layer_norm", width);
    names.bare("positional_embedding", "text_model.embeddings.position_embedding.weight", {width, 77, 1, 1});
    names.bare("text_projection", "text_projection.weight", {width, width, 1, 1});
}

inline void add_t5(Names & names, const std::string & hf, int layers) {
    names.root("text_encoders.t5xxl.transformer.", hf);
    for (int i = 0; i < layers; ++i) {
        for (const char * proj : {"q", "k", "v", "o"}) {
            const std::string path = at("encoder.block.#.layer.0.SelfAttention.", i) + proj;
            names.linear(path, path, 4096, 4096, false);
        }
        for (const char * wi : {"wi_0", "wi_1"}) {
            const std::string path = at("encoder.block.#.layer.1.DenseReluDense.", i) + wi;
            names.linear(path, path, 10240, 4096, false);
        }
        const std::string wo = at("encoder.block.#.layer.1.DenseReluDense.wo", i);
        names.linear(wo, wo, 4096, 10240, false);
    }
}

// ---- transformers --------------------------------------------------------------------------------------

inline void add_flux(Names & names, int64_t inputs = 64, int doubles = 19, int singles = 38) {
    const int64_t h = 3072, mlp = 4 * h;
    names.root("model.diffusion_model.", "transformer.");
    names.linear("img_in", "x_embedder", h, inputs).linear("txt_in", "context_embedder", h, 4096);
    for (const auto & [orig, hf] :
         {std::pair<std::string, std::string>{"time_in", "timestep"}, {"vector_in", "text"}}) {
        names.linear(orig + ".in_layer", "time_text_embed." + hf + "_embedder.linear_1", h,
                     orig == "time_in" ? 256 : 768);
        names.linear(orig + ".out_layer", "time_text_embed." + hf + "_embedder.linear_2", h, h);
    }
    for (int i = 0; i < doubles; ++i) {
        const std::string to = at("double_blocks.#", i), from = at("transformer_blocks.#", i),
                          attn = from + ".attn";
        names.linear(to + ".img_mod.lin", from + ".norm1.linear", 6 * h, h);
        names.linear(to + ".txt_mod.lin", from + ".norm1_context.linear", 6 * h, h);
        names.fused(to + ".img_attn.qkv", h, {{attn + ".to_q", h}, {attn + ".to_k", h}, {attn + ".to_v", h}});
        names.fused(to + ".txt_attn.qkv", h,
                    {{attn + ".add_q_proj", h}, {attn + ".add_k_proj", h}, {attn + ".add_v_proj", h}});
        names.linear(to + ".img_attn.proj", attn + ".to_out.0", h, h)
            .linear(to + ".txt_attn.proj", attn + ".to_add_out", h, h);
        names.linear(to + ".img_mlp.0", from + ".ff.net.0.proj", mlp, h)
            .linear(to + ".img_mlp.2", from + ".ff.net.2", h, mlp);
        names.linear(to + ".txt_mlp.0", from + ".ff_context.net.0.proj", mlp, h)
            .linear(to + ".txt_mlp.2", from + ".ff_context.net.2", h, mlp);
        for (const auto & [orig, hf] :
             {std::pair<std::string, std::string>{"img_attn.norm.query_norm", "norm_q"},
              {"img_attn.norm.key_norm", "norm_k"},
              {"txt_attn.norm.query_norm", "norm_added_q"},
              {"txt_attn.norm.key_norm", "norm_added_k"}}) {
            names.bare(to + "." + orig + ".scale", attn + "." + hf + ".weight", {128, 1, 1, 1});
        }
    }
    for (int i = 0; i < singles; ++i) {
        const std::string to = at("single_blocks.#", i), from = at("single_transformer_blocks.#", i);
        names.linear(to + ".modulation.lin", from + ".norm.linear", 3 * h, h);
        names.fused(to + ".linear1", h,
                    {{from + ".attn.to_q", h},
                     {from + ".attn.to_k", h},
                     {from + ".attn.to_v", h},
                     {from + ".proj_mlp", mlp}});
        names.linear(to + ".linear2", from + ".proj_out", h, h + mlp);
        names.bare(to + ".norm.query_norm.scale", from + ".attn.norm_q.weight", {128, 1, 1, 1});
        names.bare(to + ".norm.key_norm.scale", from + ".attn.norm_k.weight", {128, 1, 1, 1});
    }
    names.fused("final_layer.adaLN_modulation.1", h, {{"norm_out.linear", 2 * h}}, true);
    names.linear("final_layer.linear", "proj_out", 64, h);
    add_clip(names, "text_encoders.clip_l.transformer.", "text_encoder.", 768, 12);
}

inline void add_sd3(Names & names, int depth = 24, int dual = 13) {
    const int64_t h = 64 * depth;
    names.root("model.diffusion_model.", "transformer.");
    names.conv("x_embedder.proj", "pos_embed.proj", h, 16, 2)
        .linear("context_embedder", "context_embedder", h, 4096);
    names.linear("t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1", h, 256);
    names.linear("y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1", h, 2048);
    for (int i = 0; i < depth; ++i) {
        const std::string to = at("joint_blocks.#", i), x = to + ".x_block", c = to + ".context_block";
        const std::string from = at("transformer_blocks.#", i), attn = from + ".attn";
        const bool last = i + 1 == depth;
        names.linear(x + ".adaLN_modulation.1", from + ".norm1.linear", (i < dual ? 9 : 6) * h, h);
        names.fused(x + ".attn.qkv", h, {{attn + ".to_q", h}, {attn + ".to_k", h}, {attn + ".to_v", h}});
        names.fused(c + ".attn.qkv", h,
                    {{attn + ".add_q_proj", h}, {attn + ".add_k_proj", h}, {attn + ".add_v_proj", h}});
        names.linear(x + ".attn.proj", attn + ".to_out.0", h, h);
        names.linear(x + ".mlp.fc1", from + ".ff.net.0.proj", 4 * h, h)
            .linear(x + ".mlp.fc2", from + ".ff.net.2", h, 4 * h);
        names.bare(x + ".attn.ln_q.weight", attn + ".norm_q.weight", {64, 1, 1, 1});
        if (i < dual) {
            const std::string attn2 = from + ".attn2";
            names.fused(x + ".attn2.qkv", h,
                        {{attn2 + ".to_q", h}, {attn2 + ".to_k", h}, {attn2 + ".to_v", h}});
            names.linear(x + ".attn2.proj", attn2 + ".to_out.0", h, h);
        }
        if (last) {
            names.fused(c + ".adaLN_modulation.1", h, {{from + ".norm1_context.linear", 2 * h}}, true);
        } else {
            names.linear(c + ".adaLN_modulation.1", from + ".norm1_context.linear", 6 * h, h);
            names.linear(c + ".attn.proj", attn + ".to_add_out", h, h);
            names.linear(c + ".mlp.fc1", from + ".ff_context.net.0.proj", 4 * h, h);
            names.linear(c + ".mlp.fc2", from + ".ff_context.net.2", h, 4 * h);
        }
    }
    names.fused("final_layer.adaLN_modulation.1", h, {{"norm_out.linear", 2 * h}}, true);
    names.linear("final_layer.linear", "proj_out", 64, h);
    add_clip(names, "text_encoders.clip_l.transformer.", "text_encoder.", 768, 12);
    add_clip(names, "text_encoders.clip_g.transformer.", "text_encoder_2.", 1280, 32);
}

// ---- families ------------------------------------------------------------------------------------------

inline Names sd1_names(int64_t channels = 4) {
    Names names;
    add_unet(names, {{320, 640, 1280, 1280}, {1, 1, 1, 0}, 768, true, false, channels});
    add_clip(names, "cond_stage_model.transformer.", "text_encoder.", 768, 12);
    names.root("first_stage_model.", "vae.").conv("decoder.conv_in", "decoder.conv_in", 512, 4, 3);
    return names;
}

inline Names sd2_names() {
    Names names;
    add_unet(names, {{320, 640, 1280, 1280}, {1, 1, 1, 0}, 1024, false, false});
    add_open_clip(names, "cond_stage_model.model.", "text_encoder.", 1024, 23);
    return names;
}

inline Names sdxl_names() {
    Names names;
    add_unet(names, {{320, 640, 1280}, {0, 2, 10}, 2048, false, true});
    add_clip(names, "conditioner.embedders.0.transformer.", "text_encoder.", 768, 12);
    add_open_clip(names, "conditioner.embedders.1.model.", "text_encoder_2.", 1280, 32);
    return names;
}

inline Names flux_names(bool with_t5 = true, int64_t inputs = 64) {
    Names names;
    add_flux(names, inputs);
    if (with_t5) {
        add_t5(names, "text_encoder_2.", 24);
    }
    return names;
}

inline Names sd3_names() {
    Names names;
    add_sd3(names);
    add_t5(names, "text_encoder_3.", 24);
    return names;
}

// What a stem means: "model….weight", with "[first:end]" for a part, and "~" where halves are swapped; "" if
// nothing.
inline std::string meaning(const LoraNames & names, const std::string & stem,
                           const std::string & leaf = "weight") {
    const std::vector<LoraTarget> found = names.find(stem, leaf);
    if (found.empty()) {
        return "";
    }
    const LoraTarget & target = found[0];
    std::string name = target.weight->name;
    const bool whole = target.first_row == 0 && target.rows == form_of(*target.weight).out;
    if (!whole) {
        name += "[" + std::to_string(target.first_row) + ":" +
                std::to_string(target.first_row + target.rows) + "]";
    }
    return name + (target.swap_halves ? "~" : "");
}

} // namespace sd::test
