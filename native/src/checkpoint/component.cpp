#include "checkpoint/component.h"

#include "core/affix.h"
#include "core/error.h"
#include "core/words.h"

#include <algorithm>
#include <string_view>

namespace sd {
namespace {

constexpr const char * T5 = "text_encoders.t5xxl.transformer.";

const std::vector<Role> & roles() {
    static const std::vector<Role> ROLES = {
        {{"model", "unet"},
         "denoiser",
         true,
         {"model.diffusion_model.", "unet.", "transformer."},
         {
             {"model.diffusion_model.", "model.diffusion_model.", "model.diffusion_model."},
             {"unet.", "unet.", "unet."},
             {"diffusion_model.", "diffusion_model.", "model.diffusion_model."},
             {"input_blocks.", "", "model.diffusion_model."},
             {"down_blocks.", "", "unet."},
             {"transformer.", "transformer.", "transformer."},
             {"double_blocks.", "", "model.diffusion_model."},
             {"joint_blocks.", "", "model.diffusion_model."},
             {"transformer_blocks.", "", "transformer."},
         }},
        {{"vae"},
         "VAE",
         false,
         {"first_stage_model.", "vae."},
         {
             {"first_stage_model.", "first_stage_model.", "first_stage_model."},
             {"vae.encoder.down.", "vae.", "first_stage_model."},
             {"vae.decoder.up.", "vae.", "first_stage_model."},
             {"vae.", "vae.", "vae."},
             {"encoder.down.", "", "first_stage_model."},
             {"decoder.up.", "", "first_stage_model."},
             {"encoder.down_blocks.", "", "vae."},
             {"decoder.up_blocks.", "", "vae."},
         }},
        {{"clip_l"},
         "CLIP-L text encoder",
         false,
         {"cond_stage_model.", "conditioner.embedders.0.", "text_encoder.", "text_encoders.clip_l."},
         {
             {"cond_stage_model.transformer.", "cond_stage_model.transformer.", "text_encoder."},
             {"conditioner.embedders.0.transformer.", "conditioner.embedders.0.transformer.", "text_encoder."},
             {"text_encoder.", "text_encoder.", "text_encoder."},
             {"text_encoders.clip_l.transformer.", "text_encoders.clip_l.transformer.", "text_encoder."},
             {"text_model.", "", "text_encoder."},
             {"embeddings.token_embedding.", "", "text_encoder."}, // as transformers 5 saves a CLIPTextModel
         }},
        {{"t5xxl", "t5"},
         "T5 text encoder",
         false,
         {"text_encoders.t5xxl.", "text_encoder_3.", "text_encoder_2.shared.", "text_encoder_2.encoder."},
         {
             {"text_encoders.t5xxl.transformer.", "text_encoders.t5xxl.transformer.", T5},
             {"text_encoder_3.", "text_encoder_3.", T5},
             {"text_encoder_2.encoder.", "text_encoder_2.", T5},
             {"encoder.block.", "", T5},
             {"enc.blk.", "", T5}, // llama.cpp's GGUF files
         }},
        {{"clip_g"},
         "CLIP-G text encoder (OpenCLIP-bigG)",
         false,
         {"conditioner.embedders.1.", "text_encoder_2.text_", "text_encoders.clip_g."},
         {
             {"conditioner.embedders.1.model.", "conditioner.embedders.1.model.", "conditioner.embedders.1.model."},
             {"conditioner.embedders.0.model.", "conditioner.embedders.0.model.", "conditioner.embedders.1.model."},
             {"text_encoder_2.text_model.", "text_encoder_2.", "text_encoder_2."},
             {"text_encoders.clip_g.transformer.", "text_encoders.clip_g.transformer.", "text_encoder_2."},
             {"text_model.", "", "text_encoder_2."},
             {"embeddings.token_embedding.", "", "text_encoder_2."},
             {"transformer.resblocks.", "", "conditioner.embedders.1.model."},
         }},
        {{"clip_h"},
         "CLIP-H text encoder (OpenCLIP-H)",
         false,
         {"cond_stage_model.", "text_encoder."},
         {
             {"cond_stage_model.model.", "cond_stage_model.model.", "cond_stage_model.model."},
             {"text_encoder.", "text_encoder.", "text_encoder."},
             {"text_model.", "", "text_encoder."},
             {"embeddings.token_embedding.", "", "text_encoder."},
             {"transformer.resblocks.", "", "cond_stage_model.model."},
         }},
        {{"clip_vision"},
         "image tower of SigLIP",
         false,
         {"clip_vision.", "image_encoder."},
         {
             {"clip_vision.", "clip_vision.", "clip_vision."},
             {"image_encoder.", "image_encoder.", "clip_vision."},
             {"vision_model.", "", "clip_vision."},
             {"embeddings.patch_embedding.", "", "clip_vision.vision_model."}, // as transformers 5 may save it
         }},
        {{"redux"},
         "image embedder of FLUX.1 Redux",
         false,
         {"redux.", "image_embedder."},
         {
             {"redux.", "redux.", "redux."},
             {"image_embedder.", "image_embedder.", "redux."},
             {"redux_up.", "", "redux."},
         }},
    };
    return ROLES;
}

// T5's encoder as llama.cpp's converter names it: "enc.blk.3.ffn_gate.weight".
std::string t5_name_of_llama(const std::string & name) {
    struct Leaf {
        const char * llama;
        const char * transformers;
    };
    static constexpr Leaf LEAVES[] = {
        {"attn_norm.", "layer.0.layer_norm."},
        {"attn_q.", "layer.0.SelfAttention.q."},
        {"attn_k.", "layer.0.SelfAttention.k."},
        {"attn_v.", "layer.0.SelfAttention.v."},
        {"attn_o.", "layer.0.SelfAttention.o."},
        {"attn_rel_b.", "layer.0.SelfAttention.relative_attention_bias."},
        {"ffn_norm.", "layer.1.layer_norm."},
        {"ffn_gate.", "layer.1.DenseReluDense.wi_0."},
        {"ffn_up.", "layer.1.DenseReluDense.wi_1."},
        {"ffn_down.", "layer.1.DenseReluDense.wo."},
    };
    if (begins_with(name, "token_embd.")) {
        return "shared." + name.substr(11);
    }
    if (begins_with(name, "enc.output_norm.")) {
        return "encoder.final_layer_norm." + name.substr(16);
    }
    constexpr size_t AT = 8; // of the block's number
    const size_t     dot = begins_with(name, "enc.blk.") ? name.find('.', AT) : std::string::npos;
    if (dot == std::string::npos) {
        return name;
    }
    for (const Leaf & leaf : LEAVES) {
        if (name.compare(dot + 1, std::string_view(leaf.llama).size(), leaf.llama) == 0) {
            return "encoder.block." + name.substr(AT, dot + 1 - AT) + leaf.transformers +
                   name.substr(dot + 1 + std::string_view(leaf.llama).size());
        }
    }
    return name;
}

// The name with its `from`, which lies after at least `after` characters, replaced.
void replace(std::string & name, size_t after, std::string_view from, std::string_view to) {
    const size_t found = name.find(from, after);
    if (found != std::string::npos) {
        name.replace(found, from.size(), to);
    }
}

} // namespace

const Role & find_role(const std::string & name) {
    std::string known;
    for (const Role & role : roles()) {
        for (const char * spelling : role.names) {
            if (name == spelling) {
                return role;
            }
        }
        known += (known.empty() ? "" : ", ") + std::string(role.names[0]);
    }
    fail(Status::bad_argument, "component '%s' is not known; there are: %s", printable(name).c_str(),
         known.c_str());
}

bool owns(const Role & role, const std::string & name) {
    return std::any_of(role.owns.begin(), role.owns.end(),
                       [&](const char * prefix) { return begins_with(name, prefix); });
}

std::string rename_component(const Role & role, std::vector<StoredTensor> & tensors,
                             const std::string & path) {
    for (const Layout & layout : role.layouts) {
        const auto marked = [&](const StoredTensor & tensor) {
            return begins_with(tensor.name, layout.mark);
        };
        if (std::none_of(tensors.begin(), tensors.end(), marked)) {
            continue;
        }
        const auto foreign = [&](const StoredTensor & tensor) {
            return !begins_with(tensor.name, layout.strip);
        };
        tensors.erase(std::remove_if(tensors.begin(), tensors.end(), foreign), tensors.end());
        for (StoredTensor & tensor : tensors) {
            tensor.name =
                usual_name(layout.prefix + tensor.name.substr(std::string_view(layout.strip).size()));
        }
        return layout.prefix;
    }
    const std::string first =
        tensors.empty() ? "it has no tensors" : "its first tensor is " + printable(tensors[0].name);
    fail(Status::bad_file, "%s: holds no %s that we know (%s); is it another component?", path.c_str(),
         role.what, first.c_str());
}

bool is_bare_denoiser(const std::vector<StoredTensor> & tensors) {
    // Of parameters that no LoRA has by these names, however bare its own are.
    static constexpr std::string_view TELLING[] = {
        "double_blocks.0.img_attn.proj.bias", "joint_blocks.0.x_block.attn.proj.bias", "transformer_blocks.0.ff.net.2.bias",
        "input_blocks.1.0.in_layers.0.bias", "down_blocks.0.resnets.0.norm1.bias",
    };
    return std::any_of(tensors.begin(), tensors.end(), [](const StoredTensor & tensor) {
        return std::find(std::begin(TELLING), std::end(TELLING), tensor.name) != std::end(TELLING);
    });
}

std::string usual_name(const std::string & name) {
    if (begins_with(name, T5)) {
        return T5 + t5_name_of_llama(name.substr(std::string_view(T5).size()));
    }
    // ComfyUI's own checkpoints call the original autoencoder "vae".
    if (begins_with(name, "vae.")) {
        const std::string_view inner = std::string_view(name).substr(4);
        for (const char * child : {"encoder.down.", "encoder.mid.", "encoder.norm_out.", "decoder.up.", "decoder.mid.",
                                   "decoder.norm_out."}) {
            if (begins_with(inner, child)) {
                return "first_stage_model." + std::string(inner);
            }
        }
    }
    // CLIP's text tower: transformers 5 and some old single files leave "text_model." out.
    for (const std::string_view prefix :
         {"text_encoder.", "text_encoder_2.", "cond_stage_model.transformer."}) {
        if (!begins_with(name, prefix)) {
            continue;
        }
        for (const char * child : {"embeddings.", "encoder.layers.", "final_layer_norm."}) {
            if (begins_with(std::string_view(name).substr(prefix.size()), child)) {
                return std::string(prefix) + "text_model." + name.substr(prefix.size());
            }
        }
    }
    // The VAE's attention, as diffusers before 0.15 saved it.
    const size_t attention =
        begins_with(name, "vae.") ? name.find(".mid_block.attentions.") : std::string::npos;
    if (attention == std::string::npos) {
        return name;
    }
    std::string out = name;
    replace(out, attention, ".query.", ".to_q.");
    replace(out, attention, ".key.", ".to_k.");
    replace(out, attention, ".value.", ".to_v.");
    replace(out, attention, ".proj_attn.", ".to_out.0.");
    return out;
}

} // namespace sd
