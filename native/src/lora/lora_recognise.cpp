#include "lora/lora_recognise.h"

#include "core/affix.h"
#include "core/error.h"
#include "core/words.h"
#include "lora/lora_keys.h"

#include <algorithm>
#include <array>
#include <string_view>

namespace sd {
namespace {

bool has(std::string_view text, std::string_view part) { return text.find(part) != std::string_view::npos; }

enum class Where { begin, end, inside, whole };

// A name by which a kind of file gives itself away.
struct Mark {
    Where where;
    std::string_view text;
    const char * what;
    const char * advice;
};

constexpr const char * NOT_HERE = "it cannot be used here";
constexpr const char * ORDER_LOST = "it does not say which weights it means; convert it where it was trained";
constexpr const char * PACKED =
    "its factors are packed for one GPU library; get the LoRA that it was made from";

constexpr Mark MARKS[] = {
    {Where::end, ":up", "a LoRA of cloneofsimo's trainer", ORDER_LOST},
    {Where::end, ":down", "a LoRA of cloneofsimo's trainer", ORDER_LOST},
    {Where::end, ".smooth_factor", "packed by nunchaku", PACKED},
    {Where::end, ".smooth", "packed by nunchaku", PACKED},
    {Where::end, ".lora_down", "packed by nunchaku", PACKED},
    {Where::end, ".lora_up", "packed by nunchaku", PACKED},
    {Where::begin, "lllite_", "a ControlNet-LLLite", NOT_HERE},
    {Where::whole, "lora_controlnet", "a Control-LoRA (a ControlNet)", NOT_HERE},
    {Where::inside, "motion_modules", "a motion module of AnimateDiff", NOT_HERE},
    {Where::begin, "lora_prior_", "a LoRA for Stable Cascade", NOT_HERE},
    {Where::begin, "id_encoder", "a PhotoMaker", NOT_HERE},
    {Where::inside, "ip_adapter", "an IP-Adapter", NOT_HERE},
    {Where::begin, "image_proj.", "an IP-Adapter", NOT_HERE},
    {Where::inside, "controlnet_", "a ControlNet", NOT_HERE},
    {Where::inside, "zero_convs.", "a ControlNet", NOT_HERE},
    {Where::begin, "control_model.", "a ControlNet", NOT_HERE},
    {Where::begin, "adapter.body.", "a T2I-Adapter", NOT_HERE},
    {Where::whole, "emb_params", "a textual inversion", NOT_HERE},
    {Where::begin, "string_to_param", "a textual inversion", NOT_HERE},
};

bool fits(const Mark & mark, std::string_view name) {
    switch (mark.where) {
    case Where::begin:
        return begins_with(name, mark.text);
    case Where::end:
        return ends_with(name, mark.text);
    case Where::inside:
        return has(name, mark.text);
    default:
        return name == mark.text;
    }
}

[[noreturn]] void refuse(const Checkpoint & file, const char * what, const char * advice) {
    fail(Status::unsupported, "%s: is %s, not a LoRA; %s", file.path().c_str(), what, advice);
}

bool is_update(const std::string & name) {
    const std::optional<LoraKey> key = parse_lora_key(name);
    if (!key) {
        return false;
    }
    switch (key->role) {
    case LoraRole::weight:
    case LoraRole::bias:
    case LoraRole::scale: // norms of FLUX are called so
    case LoraRole::alpha:
    case LoraRole::known:
    case LoraRole::bundled:
        return false;
    default:
        return true;
    }
}

bool any_begins(const Checkpoint & file, std::initializer_list<std::string_view> begins) {
    return std::any_of(file.tensors().begin(), file.tensors().end(), [&](const StoredTensor & tensor) {
        return std::any_of(begins.begin(), begins.end(),
                           [&](std::string_view begin) { return begins_with(tensor.name, begin); });
    });
}

// A file without a single update: what else it may be.
[[noreturn]] void refuse_without_updates(const Checkpoint & file) {
    constexpr const char * AS_MODEL = "give it as the model";
    const bool has_denoiser = any_begins(file, {"model.diffusion_model.", "unet.", "input_blocks.",
                                                "down_blocks.", "diffusion_model.", "transformer.",
                                                "double_blocks.", "joint_blocks.", "transformer_blocks."});
    const bool has_vae = any_begins(file, {"first_stage_model.", "vae.", "encoder.down", "encoder.conv_in",
                                           "decoder.up", "decoder.conv_in"});
    const bool has_text =
        any_begins(file, {"cond_stage_model.", "conditioner.", "text_model.", "text_encoder",
                          "embeddings.token_embedding", "encoder.block.", "encoder.layers."});
    if (has_denoiser) {
        refuse(file, has_vae || has_text ? "a whole checkpoint" : "a denoiser", AS_MODEL);
    }
    if (has_vae) {
        refuse(file, "a VAE", "give it as the component vae");
    }
    if (has_text) {
        refuse(file, "a text encoder", "give it as the component clip_l");
    }
    if (any_begins(file, {"320.", "640.", "768.", "1024.", "1280."})) {
        refuse(file, "a hypernetwork", NOT_HERE);
    }
    const bool few = file.tensors().size() <= 4;
    const bool tokens =
        std::all_of(file.tensors().begin(), file.tensors().end(), [](const StoredTensor & tensor) {
            return tensor.dims <= 2 && (tensor.ne[0] == 768 || tensor.ne[0] == 1024 || tensor.ne[0] == 1280 ||
                                        tensor.ne[0] == 4096);
        });
    if (file.tensors().empty()) {
        fail(Status::bad_file, "%s: has no tensors", file.path().c_str());
    }
    if (few && tokens) {
        refuse(file, "a textual inversion", NOT_HERE);
    }
    const std::string & first = file.tensors()[0].name;
    fail(Status::bad_file, "%s: none of its %s keys is one of a LoRA, first %s", file.path().c_str(),
         grouped(file.tensors().size()).c_str(), printable(first).c_str());
}

// The input features of a module, as far as this factor tells; 0 where it does not.
int64_t inputs(const StoredTensor & tensor) {
    const std::optional<LoraKey> key = parse_lora_key(tensor.name);
    switch (key ? key->role : LoraRole::known) {
    case LoraRole::down:
    case LoraRole::hada_w1_b:
    case LoraRole::diff:
        return tensor.dims == 2 ? tensor.ne[0] : 0;
    default:
        return 0;
    }
}

std::string base_by_keys(const Checkpoint & file) {
    bool two_encoders = false, has_joint_blocks = false; // FLUX has blocks that SD 3 calls the same
    std::string by_width;
    for (const StoredTensor & tensor : file.tensors()) {
        std::string name = tensor.name;
        std::replace(name.begin(), name.end(), '.', '_');
        if (has(name, "double_blocks_") || has(name, "single_blocks_") ||
            has(name, "single_transformer_blocks_")) {
            return "FLUX";
        }
        has_joint_blocks = has_joint_blocks || has(name, "joint_blocks_") ||
                           has(name, "transformer_blocks_23_attn_add_") || has(name, "norm1_context");
        if (begins_with(name, "transformer_blocks_") ||
            begins_with(name, "transformer_transformer_blocks_") ||
            begins_with(name, "lora_transformer_transformer_blocks_")) { // diffusers' names of both
            const int64_t width = has(name, "_attn_to_") ? inputs(tensor) : 0;
            if (width == 3072) {
                return "FLUX";
            }
            has_joint_blocks = has_joint_blocks || width > 0;
        }
        two_encoders = two_encoders || has(name, "lora_te2_text_model_") ||
                       begins_with(name, "text_encoder_2_text_model_");
        if (!has(name, "attn2_to_k") && !has(name, "attn2_to_v") && !has(name, "attn2_processor_to_")) {
            continue;
        }
        const int64_t width = inputs(tensor);
        if (width == 768 || width == 1024 || width == 2048) {
            by_width = width == 768 ? "SD1" : width == 1024 ? "SD2" : "SDXL";
        }
    }
    return has_joint_blocks ? "SD3" : !by_width.empty() ? by_width : two_encoders ? "SDXL" : "";
}

std::string base_by_metadata(const Checkpoint & file) {
    struct Name {
        std::string_view part, model;
    };
    static constexpr Name NAMES[] = {
        {"sdxl", "SDXL"},        {"xl-v1", "SDXL"},      {"sd_v1", "SD1"},
        {"diffusion-v1", "SD1"}, {"sd_v2", "SD2"},       {"diffusion-v2", "SD2"},
        {"sd3", "SD3"},          {"diffusion-3", "SD3"}, {"flux", "FLUX"},
    };
    for (const char * key : {"ss_base_model_version", "modelspec.architecture"}) {
        const auto stated = file.metadata().find(key);
        if (stated == file.metadata().end()) {
            continue;
        }
        for (const Name & name : NAMES) {
            if (has(stated->second, name.part)) {
                return std::string(name.model);
            }
        }
        return printable(stated->second);
    }
    return "";
}

} // namespace

void refuse_other_kinds(const Checkpoint & file) {
    bool has_update = false;
    for (const StoredTensor & tensor : file.tensors()) {
        for (const Mark & mark : MARKS) {
            if (fits(mark, tensor.name)) {
                refuse(file, mark.what, mark.advice);
            }
        }
        has_update = has_update || is_update(tensor.name);
    }
    if (!has_update) {
        refuse_without_updates(file);
    }
}

std::string guess_base_model(const Checkpoint & file) {
    const std::string by_keys = base_by_keys(file);
    return by_keys.empty() ? base_by_metadata(file) : by_keys;
}

} // namespace sd
