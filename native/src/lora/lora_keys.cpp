#include "lora/lora_keys.h"

#include "core/affix.h"

#include <string_view>

namespace sd {
namespace {

// How a suffix may be used.
enum class Use {
    plain,
    named, // PEFT puts the adapter's name behind it or, where it ends so, before ".weight" or ".bias"
    xlabs, // too short to stand alone: only behind a stem that ends as XLabs' processors do
};

struct Suffix {
    std::string_view text;
    LoraRole role;
    Use use = Use::plain;
    const char * spelling = ""; // shared by the halves of a pair
    const char * format = "";
};

// A longer suffix stands before a shorter one that ends it.
constexpr Suffix SUFFIXES[] = {
    {".lora_down.weight", LoraRole::down, Use::plain, "lora_down", "kohya"},
    {".lora_up.weight", LoraRole::up, Use::plain, "lora_down", "kohya"},
    {".lora_mid.weight", LoraRole::mid, Use::plain, "lora_down", "kohya"},
    {".lora_A.weight", LoraRole::down, Use::named, "lora_A", "peft"},
    {".lora_B.weight", LoraRole::up, Use::named, "lora_A", "peft"},
    {".lora_B.bias", LoraRole::up_bias, Use::named, "lora_A", "peft"},
    {".lora_A", LoraRole::down, Use::named, "lora_A", "peft"},
    {".lora_B", LoraRole::up, Use::named, "lora_A", "peft"},
    {".lora_embedding_A", LoraRole::embedding_down, Use::named, "lora_A", "peft"},
    {".lora_embedding_B", LoraRole::embedding_up, Use::named, "lora_A", "peft"},
    {".weight.lora_a", LoraRole::down, Use::plain, "lora_a", "llama.cpp"},
    {".weight.lora_b", LoraRole::up, Use::plain, "lora_a", "llama.cpp"},
    {".lora_a", LoraRole::down, Use::plain, "lora_a", "llama.cpp"},
    {".lora_b", LoraRole::up, Use::plain, "lora_a", "llama.cpp"},
    {".lora.down.weight", LoraRole::down, Use::plain, "lora.down", "old diffusers"},
    {".lora.up.weight", LoraRole::up, Use::plain, "lora.down", "old diffusers"},
    {".lora_linear_layer.down.weight", LoraRole::down, Use::plain, "linear_layer", "old diffusers"},
    {".lora_linear_layer.up.weight", LoraRole::up, Use::plain, "linear_layer", "old diffusers"},
    {"_lora.down.weight", LoraRole::down, Use::plain, "processor", "attention processor"},
    {"_lora.up.weight", LoraRole::up, Use::plain, "processor", "attention processor"},
    {".down.weight", LoraRole::down, Use::xlabs, "xlabs", "xlabs"},
    {".up.weight", LoraRole::up, Use::xlabs, "xlabs", "xlabs"},
    {".hada_w1_a", LoraRole::hada_w1_a, Use::named, "hada", "lycoris"},
    {".hada_w1_b", LoraRole::hada_w1_b, Use::named, "hada", "lycoris"},
    {".hada_w2_a", LoraRole::hada_w2_a, Use::named, "hada", "lycoris"},
    {".hada_w2_b", LoraRole::hada_w2_b, Use::named, "hada", "lycoris"},
    {".hada_t1", LoraRole::hada_t1, Use::named, "hada", "lycoris"},
    {".hada_t2", LoraRole::hada_t2, Use::named, "hada", "lycoris"},
    {".lokr_w1", LoraRole::lokr_w1, Use::named, "lokr", "lycoris"},
    {".lokr_w1_a", LoraRole::lokr_w1_a, Use::named, "lokr", "lycoris"},
    {".lokr_w1_b", LoraRole::lokr_w1_b, Use::named, "lokr", "lycoris"},
    {".lokr_w2", LoraRole::lokr_w2, Use::named, "lokr", "lycoris"},
    {".lokr_w2_a", LoraRole::lokr_w2_a, Use::named, "lokr", "lycoris"},
    {".lokr_w2_b", LoraRole::lokr_w2_b, Use::named, "lokr", "lycoris"},
    {".lokr_t2", LoraRole::lokr_t2, Use::named, "lokr", "lycoris"},
    {".diff", LoraRole::diff},
    {".diff_b", LoraRole::diff_bias},
    {".w_norm", LoraRole::diff, Use::plain, "norm", "lycoris"},
    {".b_norm", LoraRole::diff_bias, Use::plain, "norm", "lycoris"},
    {".set_weight", LoraRole::set_weight},
    {".reshape_weight", LoraRole::known},
    {".on_input", LoraRole::on_input, Use::plain, "ia3", "lycoris"},
    {".ia3_l", LoraRole::ia3_factor, Use::named, "ia3", "peft"},
    {".a1.weight", LoraRole::a1, Use::plain, "glora", "lycoris"},
    {".a2.weight", LoraRole::a2, Use::plain, "glora", "lycoris"},
    {".b1.weight", LoraRole::b1, Use::plain, "glora", "lycoris"},
    {".b2.weight", LoraRole::b2, Use::plain, "glora", "lycoris"},
    {".bm.weight", LoraRole::bm, Use::plain, "glora", "lycoris"},
    {".oft_blocks", LoraRole::oft_blocks, Use::plain, "oft", "lycoris"},
    {".oft_R.weight", LoraRole::oft_rotation, Use::named, "oft", "peft"},
    {".oft_diag", LoraRole::unreadable},
    {".rescale", LoraRole::rescale, Use::plain, "oft", "lycoris"},
    {".dora_scale", LoraRole::magnitude},
    {".lora_magnitude_vector", LoraRole::magnitude_of_rows, Use::named},
    {".lora_magnitude_vector.weight", LoraRole::magnitude_of_rows, Use::named},
    {".magnitude", LoraRole::magnitude_of_rows},
    {".alpha", LoraRole::alpha},
    {".scale", LoraRole::scale},
    {".scalar", LoraRole::scalar},
    {".bias_indices", LoraRole::unreadable}, // LyCORIS' sparse rest of an extraction
    {".bias_values", LoraRole::unreadable},
    {".bias_size", LoraRole::unreadable},
    {".position_ids", LoraRole::known},
    // Last, as several of the above end so.
    {".weight", LoraRole::weight},
    {".bias", LoraRole::bias},
};

const Suffix * find_suffix(std::string_view key) {
    for (const Suffix & suffix : SUFFIXES) {
        if (!ends_with(key, suffix.text)) {
            continue;
        }
        const std::string_view stem = key.substr(0, key.size() - suffix.text.size());
        if (suffix.use != Use::xlabs || ends_with(stem, "_lora1") || ends_with(stem, "_lora2")) {
            return &suffix;
        }
    }
    return nullptr;
}

LoraKey make_key(std::string_view key, const Suffix & suffix) {
    return {std::string(key.substr(0, key.size() - suffix.text.size())), suffix.role, suffix.spelling,
            suffix.format};
}

bool is_parameter(const Suffix & suffix) {
    return suffix.role == LoraRole::weight || suffix.role == LoraRole::bias;
}

// "X.lora_A.NAME.weight" and "X.lora_A.NAME": the key without its adapter's name.
std::optional<LoraKey> parse_named(const std::string & key) {
    const size_t last = key.rfind('.');
    const size_t before =
        last == std::string::npos || last == 0 ? std::string::npos : key.rfind('.', last - 1);
    if (before == std::string::npos) {
        return std::nullopt;
    }
    const std::string without_last = key.substr(0, last);
    const std::string without_inner = key.substr(0, before) + key.substr(last);
    for (const std::string * shorter : {&without_inner, &without_last}) {
        const Suffix * suffix = find_suffix(*shorter);
        if (suffix && suffix->use == Use::named) {
            LoraKey out = make_key(*shorter, *suffix);
            out.spelling += "." + (shorter == &without_last ? key.substr(last + 1)
                                                            : key.substr(before + 1, last - before - 1));
            return out;
        }
    }
    return std::nullopt;
}

// "X.oft_blocks.2": the rotation of one part of a fused weight.
std::optional<LoraKey> parse_part(const std::string & key) {
    constexpr std::string_view BLOCKS = ".oft_blocks.";
    const size_t digit = key.size() - 1;
    if (key.size() <= BLOCKS.size() + 1 || key[digit] < '0' || key[digit] > '9' ||
        !ends_with(std::string_view(key).substr(0, digit), BLOCKS)) {
        return std::nullopt;
    }
    return LoraKey{key.substr(0, digit - BLOCKS.size()), LoraRole::oft_blocks, "oft", "kohya",
                   key[digit] - '0'};
}

} // namespace

std::optional<LoraKey> parse_lora_key(const std::string & key) {
    if (begins_with(key, "bundle_emb.")) {
        return LoraKey{key, LoraRole::bundled, ""};
    }
    if (key.find("._aux.") != std::string::npos || key == "loss" || begins_with(key, "optimizer")) {
        return LoraKey{key, LoraRole::known, ""};
    }
    const Suffix * suffix = find_suffix(key);
    if (suffix && !is_parameter(*suffix)) {
        return make_key(key, *suffix);
    }
    if (std::optional<LoraKey> named = parse_named(key)) {
        return named;
    }
    if (std::optional<LoraKey> part = parse_part(key)) {
        return part;
    }
    return suffix ? std::optional<LoraKey>(make_key(key, *suffix)) : std::nullopt;
}

} // namespace sd
