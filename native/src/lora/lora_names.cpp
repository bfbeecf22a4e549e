#include "lora/lora_names.h"

#include "core/affix.h"
#include "core/error.h"

#include <algorithm>
#include <string_view>

namespace sd {
namespace {

std::string flat(std::string path) {
    std::replace(path.begin(), path.end(), '.', '_');
    return path;
}

// The text with `from` at its end replaced; "" where it does not end so.
std::string with_end(const std::string & text, std::string_view from, std::string_view to) {
    return ends_with(text, from) ? text.substr(0, text.size() - from.size()) + std::string(to) : "";
}

// Other spellings of a module's path.
std::vector<std::string> variants(const std::string & path) {
    std::vector<std::string> out{path};
    const auto add = [&](const std::string & variant) {
        if (!variant.empty()) {
            out.push_back(variant);
        }
    };
    add(with_end(path, ".to_out.0", ".to_out"));
    if (path.find(".attn") != std::string::npos) { // processors own their LoRA in diffusers up to 0.18
        for (const char * name : {".to_q", ".to_k", ".to_v"}) {
            add(with_end(path, name, std::string(".processor") + name));
        }
        add(with_end(path, ".to_out.0", ".processor.to_out"));
    }
    for (const char * name : {"q", "k", "v", "out"}) { // the text encoder in the oldest files of diffusers
        const std::string proj = std::string(".self_attn.") + name + "_proj";
        add(with_end(path, proj, std::string(".self_attn.to_") + name));
    }
    if (begins_with(path, "text_model.")) { // transformers 5 leaves it out
        for (std::string & variant : std::vector<std::string>(out)) {
            add(variant.substr(std::string_view("text_model.").size()));
        }
    }
    return out;
}

} // namespace

struct LoraNames::Prefix {
    std::string_view text;
    bool flat;
    std::vector<Component> may_mean;
};

// The stem behind the prefix decides: "encoder_block_…" is T5 and "text_model_encoder_…" is CLIP, by whatever
// number trainers count their encoders.
const std::vector<LoraNames::Prefix> & LoraNames::prefixes() {
    static const std::vector<Prefix> PREFIXES = {
        {"lora_unet_", true, {denoiser}},
        {"lora_transformer_", true, {denoiser}},
        {"oft_unet_", true, {denoiser}},
        {"lycoris_", true, {denoiser, clip, t5}},
        {"lora_te_", true, {clip}},
        {"lora_te1_", true, {clip}},
        {"lora_te2_", true, {clip_2, t5}},
        {"lora_te3_", true, {t5}},
        {"oft_te_", true, {clip}},
        {"oft_te1_", true, {clip}},
        {"oft_te2_", true, {clip_2}},
        {"unet.", false, {denoiser}},
        {"transformer.", false, {denoiser}},
        {"diffusion_model.", false, {denoiser}},
        {"model.diffusion_model.", false, {denoiser}},
        {"text_encoder.", false, {clip}},
        {"text_encoder_2.", false, {clip_2, t5}},
        {"text_encoder_3.", false, {t5}},
        {"text_encoders.clip_l.transformer.", false, {clip}},
        {"text_encoders.clip_g.transformer.", false, {clip_2}},
        {"text_encoders.t5xxl.transformer.", false, {t5}},
        {"conditioner.embedders.0.transformer.", false, {clip}},
        {"conditioner.embedders.1.model.", false, {clip_2}},
        {"cond_stage_model.transformer.", false, {clip}},
        {"cond_stage_model.model.", false, {clip}},
        {"", false, {denoiser, clip, t5}},
    };
    return PREFIXES;
}

LoraNames::LoraNames(const std::deque<Weight> & weights) {
    targets_.reserve(weights.size() * 8);
    for (const Weight & weight : weights) {
        add(weight);
    }
}

void LoraNames::add(const Weight & weight) {
    static constexpr struct {
        std::string_view prefix;
        Component component;
    } PLACES[] = {
        {"model.diffusion_model.", denoiser},
        {"cond_stage_model.transformer.", clip},
        {"cond_stage_model.model.", clip},
        {"conditioner.embedders.0.transformer.", clip},
        {"text_encoders.clip_l.transformer.", clip},
        {"conditioner.embedders.1.model.", clip_2},
        {"text_encoders.clip_g.transformer.", clip_2},
        {"text_encoders.t5xxl.transformer.", t5},
    };
    // Behind the component's name, which diffusers' layout has too.
    const auto inner = [](const std::string & diffusers) {
        const size_t dot = diffusers.find('.');
        return dot == std::string::npos ? "" : diffusers.substr(dot + 1);
    };
    // OpenCLIP keeps this matrix transposed, and it is resident as HF has it: updates under HF's name fit.
    const bool turned = ends_with(weight.name, ".text_projection") && ends_with(weight.diffusers, ".weight");
    for (const auto & place : PLACES) {
        if (!begins_with(weight.name, place.prefix)) {
            continue;
        }
        has_[place.component] = true;
        const LoraTarget whole{&weight, 0, form_of(weight).out, false};
        if (!turned) {
            add_path(place.component, weight.name.substr(place.prefix.size()), whole);
        }
        if (!weight.diffusers.empty()) {
            add_path(place.component, inner(weight.diffusers), whole);
        }
        for (const WeightPart & part : weight.parts) {
            add_path(place.component, inner(part.diffusers),
                     {&weight, part.first_row, part.rows, part.swap_halves});
        }
        return;
    }
}

// XLabs' names for modules of FLUX, by which its processors call them.
static std::string xlabs_name(const std::string & module, const Weight & weight, LoraTarget & target) {
    struct Rule {
        std::string_view begin, end, to;
    };
    static constexpr Rule RULES[] = {
        {"double_blocks.", ".img_attn.qkv", ".processor.qkv_lora1"},
        {"double_blocks.", ".txt_attn.qkv", ".processor.qkv_lora2"},
        {"double_blocks.", ".img_attn.proj", ".processor.proj_lora1"},
        {"double_blocks.", ".txt_attn.proj", ".processor.proj_lora2"},
        {"single_blocks.", ".linear1", ".processor.qkv"},
        {"single_blocks.", ".linear2", ".processor.proj"},
    };
    for (const Rule & rule : RULES) {
        if (!begins_with(module, rule.begin) || !ends_with(module, rule.end)) {
            continue;
        }
        if (rule.end == ".linear1" && weight.parts.size() == 4) { // q, k and v, without the MLP that follows
            target.rows = weight.parts[3].first_row;
        }
        return with_end(module, rule.end, rule.to);
    }
    return "";
}

void LoraNames::add_path(Component component, const std::string & path, const LoraTarget & target) {
    const size_t dot = path.rfind('.');
    const std::string leaf = path.substr(dot == std::string::npos ? 0 : dot + 1);
    const std::string module = dot == std::string::npos ? "" : path.substr(0, dot);
    if (leaf == "weight" || leaf == "bias") {
        add_module(component, module, leaf[0], target);
        LoraTarget part = target;
        const std::string xlabs = xlabs_name(module, *target.weight, part);
        if (!xlabs.empty()) {
            add_module(component, xlabs, leaf[0], part);
        }
    } else if (leaf == "in_proj_weight" || leaf == "in_proj_bias") {
        add_module(component, module + ".in_proj", leaf[8], target);
    } else { // a bare parameter; its name may be the stem, or its module's
        add_module(component, path, 'w', target);
        if (leaf == "scale") {
            add_module(component, module, 'w', target);
        }
    }
}

void LoraNames::add_module(Component component, const std::string & module, char leaf,
                           const LoraTarget & target) {
    const std::string tag{static_cast<char>('0' + component), leaf};
    for (const std::string & variant : variants(module)) {
        put(tag + "." + variant, target);
        put(tag + "_" + flat(variant), target);
    }
}

void LoraNames::put(const std::string & key, const LoraTarget & target) {
    const auto [at, is_new] = targets_.emplace(key, target);
    const LoraTarget & there = at->second;
    if (!is_new && (there.weight != target.weight || there.first_row != target.first_row ||
                    there.rows != target.rows || there.swap_halves != target.swap_halves)) {
        fail(Status::internal, "the name '%s' of LoRA modules means both %s and %s", key.c_str() + 3,
             there.weight->name.c_str(), target.weight->name.c_str());
    }
}

const LoraTarget * LoraNames::look_up(const std::string & stem, char leaf) const {
    for (const Prefix & prefix : prefixes()) {
        if (!begins_with(stem, prefix.text)) {
            continue;
        }
        for (const Component component : prefix.may_mean) {
            if (prefix.may_mean.size() == 3 && component == clip && has_[clip_2]) {
                continue; // either of two encoders
            }
            const std::string tag{static_cast<char>('0' + component), leaf, prefix.flat ? '_' : '.'};
            const auto found = targets_.find(tag + stem.substr(prefix.text.size()));
            if (found != targets_.end()) {
                return &found->second;
            }
        }
    }
    return nullptr;
}

// What wrappers put before a stem.
static std::string unwrapped(const std::string & stem) {
    std::string_view rest = stem;
    for (bool found = true; found;) {
        found = false;
        for (const std::string_view wrapper : {"base_model.model.", "module."}) {
            if (begins_with(rest, wrapper)) {
                rest.remove_prefix(wrapper.size());
                found = true;
            }
        }
    }
    return std::string(rest);
}

std::vector<LoraTarget> LoraNames::find(const std::string & stem, const std::string & leaf) const {
    std::string rest = unwrapped(stem);
    const LoraTarget * found = look_up(rest, leaf[0]);
    if (!found && ends_with(rest, "_")) { // TheLastBen's files have a stray one
        rest.pop_back();
        found = look_up(rest, leaf[0]);
    }
    return found ? std::vector<LoraTarget>{*found} : std::vector<LoraTarget>{};
}

bool LoraNames::lacks_component(const std::string & stem) const {
    const std::string rest = unwrapped(stem);
    for (const char * optional :
         {"add_embedding", "label_emb", "class_embedding", "guidance_embedder", "guidance_in"}) {
        if (rest.find(optional) != std::string::npos) {
            return true;
        }
    }
    for (const Prefix & prefix : prefixes()) {
        if (prefix.text.empty() || !begins_with(rest, prefix.text)) {
            continue;
        }
        const std::string behind = flat(rest.substr(prefix.text.size()));
        const bool like_t5 = begins_with(behind, "encoder_block_") || begins_with(behind, "shared");
        return std::none_of(prefix.may_mean.begin(), prefix.may_mean.end(), [&](Component component) {
            return has_[component] && (prefix.may_mean.size() == 1 || (component == t5) == like_t5);
        });
    }
    return false;
}

bool LoraNames::is_denoiser_stem(const std::string & stem) {
    const std::string rest = unwrapped(stem);
    for (const Prefix & prefix : prefixes()) {
        if (!prefix.text.empty() && begins_with(rest, prefix.text)) {
            return prefix.may_mean[0] == denoiser && rest.find("text_model") == std::string::npos;
        }
    }
    return rest.find("text_model") == std::string::npos && !begins_with(rest, "encoder.");
}

int text_encoder_of(const Weight & weight) {
    static constexpr struct {
        std::string_view prefix;
        TextEncoder encoder;
    } PLACES[] = {
        {"cond_stage_model.", first_encoder},         {"conditioner.embedders.0.", first_encoder},
        {"conditioner.embedders.1.", clip_g_encoder}, {"text_encoders.clip_l.", first_encoder},
        {"text_encoders.clip_g.", clip_g_encoder},    {"text_encoders.t5xxl.", t5_encoder},
    };
    for (const auto & place : PLACES) {
        if (begins_with(weight.name, place.prefix)) {
            return place.encoder;
        }
    }
    return -1;
}

bool is_text_weight(const Weight & weight) { return text_encoder_of(weight) >= 0; }

WeightForm form_of(const Weight & weight) {
    const Shape & ne = weight.ne;
    if (ne[1] * ne[2] * ne[3] == 1 && !weight.table) {
        return {ne[0], 0};
    }
    return ne[2] * ne[3] == 1 ? WeightForm{ne[1], ne[0]} : WeightForm{ne[3], ne[2], ne[1], ne[0]};
}

} // namespace sd
