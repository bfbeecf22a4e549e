#include "lora_files.h"

using namespace sd;
using namespace sd::test;

namespace {

const std::string UNET = "model.diffusion_model.";

std::string flat(std::string path) {
    std::replace(path.begin(), path.end(), '.', '_');
    return path;
}

bool ends_with(const std::string & text, const std::string & end) {
    return text.size() >= end.size() && text.substr(text.size() - end.size()) == end;
}

// All of these stems mean this weight.
void check_all(const LoraNames & names, const std::vector<std::string> & stems, const std::string & weight) {
    for (const std::string & stem : stems) {
        CAPTURE(stem);
        CHECK(meaning(names, stem) == weight);
    }
}

} // namespace

TEST_CASE("every weight of SD 1 is found by every spelling of its name") {
    const Names model = sd1_names();
    const LoraNames names(model.list);
    int checked = 0;
    for (const Weight & weight : model.list) {
        const bool is_bias = ends_with(weight.name, ".bias");
        const std::string leaf = is_bias ? "bias" : "weight";
        const auto module = [&](const std::string & path, size_t skip) {
            return path.substr(skip, path.size() - leaf.size() - 1 - skip);
        };
        const auto check = [&](const std::vector<std::string> & stems) {
            for (const std::string & stem : stems) {
                CAPTURE(stem);
                CHECK(meaning(names, stem, leaf) == weight.name);
                CHECK(meaning(names, stem, is_bias ? "weight" : "bias") != weight.name);
                ++checked;
            }
        };
        if (weight.name.rfind(UNET, 0) == 0) {
            const std::string o = module(weight.name, UNET.size()), h = module(weight.diffusers, 5);
            for (const std::string & path : {o, h}) {
                check({"lora_unet_" + flat(path), "lycoris_" + flat(path), "unet." + path,
                       "diffusion_model." + path, "model.diffusion_model." + path, path,
                       "base_model.model." + path, "base_model.model.unet." + path, "module." + path,
                       "oft_unet_" + flat(path)});
            }
        } else if (weight.name.rfind("cond_stage_model.", 0) == 0) {
            const std::string t = module(weight.diffusers, 13);
            check({"lora_te_" + flat(t), "lora_te1_" + flat(t), "text_encoder." + t,
                   "text_encoders.clip_l.transformer." + t, "conditioner.embedders.0.transformer." + t,
                   "cond_stage_model.transformer." + t, t, "base_model.model." + t, "lycoris_" + flat(t),
                   "text_encoder." + t.substr(11)});
        } else {
            CHECK(meaning(names, module(weight.name, 0), leaf) == "");
            CHECK(meaning(names, "unet." + module(weight.diffusers, 4), leaf) == "");
        }
    }
    CHECK(checked > 10000);
}

TEST_CASE("cases 1, 7 and 10: kohya's names of SD 1 and of SDXL's LCM") {
    const Names sd1 = sd1_names(), sdxl = sdxl_names();
    const LoraNames one(sd1.list), xl(sdxl.list);
    const auto unet = [](const std::string & path) { return UNET + path + ".weight"; };
    CHECK(meaning(one, "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q") ==
          unet("input_blocks.1.1.transformer_blocks.0.attn1.to_q"));
    CHECK(meaning(one, "lora_unet_mid_block_attentions_0_proj_in") == unet("middle_block.1.proj_in"));
    CHECK(meaning(one, "lora_unet_up_blocks_0_upsamplers_0_conv") == unet("output_blocks.2.1.conv"));
    CHECK(meaning(one, "lora_unet_up_blocks_1_resnets_0_conv1") == unet("output_blocks.3.0.in_layers.2"));
    CHECK(meaning(one, "lora_unet_input_blocks_3_0_op") == unet("input_blocks.3.0.op"));
    CHECK(meaning(one, "lora_unet_time_embed_0") == unet("time_embed.0"));
    CHECK(meaning(xl, "lora_unet_up_blocks_0_upsamplers_0_conv") == unet("output_blocks.2.2.conv"));
    CHECK(meaning(xl, "lora_unet_add_embedding_linear_1") == unet("label_emb.0.0"));
    CHECK(meaning(xl, "lora_unet_label_emb_0_0") == unet("label_emb.0.0"));
    CHECK(meaning(xl, "unet.add_embedding.linear_2") == unet("label_emb.0.2"));
}

TEST_CASE("case 9: SDXL by its original names and by diffusers'") {
    const Names model = sdxl_names();
    const LoraNames names(model.list);
    check_all(names,
              {"lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k",
               "lora_unet_down_blocks_1_attentions_0_transformer_blocks_1_attn2_to_k",
               "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k",
               "diffusion_model.input_blocks.4.1.transformer_blocks.1.attn2.to_k"},
              UNET + "input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight");
    check_all(names,
              {"lora_unet_output_blocks_0_1_transformer_blocks_9_ff_net_0_proj",
               "lora_unet_up_blocks_0_attentions_0_transformer_blocks_9_ff_net_0_proj"},
              UNET + "output_blocks.0.1.transformer_blocks.9.ff.net.0.proj.weight");
}

TEST_CASE("cases 37 to 39: prefixes of text encoders by what follows them") {
    const Names sd1 = sd1_names(), sd2 = sd2_names(), xl = sdxl_names(), flux = flux_names(),
                bare = flux_names(false), sd3 = sd3_names();
    const LoraNames one(sd1.list), two(sd2.list), sdxl(xl.list), f(flux.list), without_t5(bare.list),
        three(sd3.list);

    CHECK(meaning(one, "lora_te1_text_model_encoder_layers_0_mlp_fc1") ==
          "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight");
    CHECK(one.lacks_component("lora_te2_text_model_encoder_layers_0_mlp_fc1"));
    CHECK_FALSE(one.lacks_component("lora_te1_text_model_encoder_layers_99_mlp_fc1"));

    const std::string q = "encoder_block_0_layer_0_SelfAttention_q";
    const std::string t5 = "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight";
    check_all(f,
              {"lora_te3_" + q, "lora_te2_" + q, "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q",
               "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q"},
              t5);
    check_all(three, {"lora_te3_" + q, "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q"}, t5);
    for (const char * prefix : {"lora_te2_", "lora_te3_"}) {
        CHECK(meaning(without_t5, prefix + q) == "");
        CHECK(without_t5.lacks_component(prefix + q));
    }
    CHECK(f.lacks_component("lora_te2_text_model_encoder_layers_0_mlp_fc1"));
    CHECK(sdxl.lacks_component("lora_te2_" + q));

    const std::string g = "conditioner.embedders.1.model.transformer.resblocks.3.";
    check_all(sdxl,
              {"lora_te2_text_model_encoder_layers_3_self_attn_v_proj",
               "text_encoder_2.text_model.encoder.layers.3.self_attn.v_proj"},
              g + "attn.in_proj_weight[2560:3840]");
    CHECK(meaning(sdxl, "lora_te2_text_model_encoder_layers_3_self_attn_k_proj", "bias") ==
          g + "attn.in_proj_bias[1280:2560]");
    CHECK(meaning(sdxl, "lora_te2_text_model_encoder_layers_3_mlp_fc2") == g + "mlp.c_proj.weight");
    CHECK(meaning(sdxl, "conditioner.embedders.1.model.transformer.resblocks.3.attn.in_proj") ==
          g + "attn.in_proj_weight");
    CHECK(meaning(sdxl, "lora_te1_text_model_encoder_layers_11_mlp_fc2") ==
          "conditioner.embedders.0.transformer.text_model.encoder.layers.11.mlp.fc2.weight");
    CHECK(meaning(sdxl, "text_model.encoder.layers.0.mlp.fc1") == ""); // either of two
    const std::string projection = "conditioner.embedders.1.model.text_projection";
    CHECK(meaning(sdxl, "lora_te2_text_projection") == projection);     // resident as HF has it
    CHECK(meaning(sdxl, "text_encoder_2.text_projection") == projection);
    CHECK(meaning(sdxl, projection) == "");                             // transposed there
    CHECK(meaning(two, "lora_te_text_model_encoder_layers_22_self_attn_q_proj") ==
          "cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight[0:1024]");
    CHECK(meaning(three, "text_encoders.clip_g.transformer.text_model.encoder.layers.3.self_attn.v_proj") ==
          "text_encoders.clip_g.transformer.text_model.encoder.layers.3.self_attn.v_proj.weight");
}

TEST_CASE("case 41: attention processors, and to_out without its number") {
    const Names model = sd1_names();
    const LoraNames names(model.list);
    const auto block = [](const std::string & attention) {
        return std::string("mid_block.attentions.0.transformer_blocks.0.") + attention;
    };
    const std::string out = UNET + "middle_block.1.transformer_blocks.0.attn1.to_out.0.weight";
    check_all(names,
              {block("attn1.processor.to_out"), "unet." + block("attn1.processor.to_out"),
               "unet." + block("attn1.to_out"), "unet." + block("attn1.to_out.0"),
               "lora_unet_" + flat(block("attn1.to_out")), "lora_unet_" + flat(block("attn1.to_out.0")),
               "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_out_0"},
              out);
    check_all(names, {block("attn2.processor.to_k"), "unet." + block("attn2.processor.to_k")},
              UNET + "middle_block.1.transformer_blocks.0.attn2.to_k.weight");

    const std::string layer = "text_encoder.text_model.encoder.layers.0.self_attn.";
    const std::string there = "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.";
    CHECK(meaning(names, layer + "to_q") == there + "q_proj.weight");
    CHECK(meaning(names, layer + "to_out") == there + "out_proj.weight");
    CHECK(meaning(names, layer + "k_proj.to_q") == ""); // nested duplicates of historic dumps
}

TEST_CASE("cases 25, 26 and 28: parts of FLUX's fused matrices") {
    const Names model = flux_names();
    const LoraNames names(model.list);
    const auto block = [](const std::string & path) { return UNET + path; };
    const std::string t = "transformer.transformer_blocks.0.attn.",
                      s = "transformer.single_transformer_blocks.7.";
    CHECK(meaning(names, t + "to_q") == block("double_blocks.0.img_attn.qkv.weight[0:3072]"));
    CHECK(meaning(names, t + "to_k") == block("double_blocks.0.img_attn.qkv.weight[3072:6144]"));
    CHECK(meaning(names, t + "to_v") == block("double_blocks.0.img_attn.qkv.weight[6144:9216]"));
    CHECK(meaning(names, t + "to_v", "bias") == block("double_blocks.0.img_attn.qkv.bias[6144:9216]"));
    CHECK(meaning(names, t + "add_v_proj") == block("double_blocks.0.txt_attn.qkv.weight[6144:9216]"));
    CHECK(meaning(names, s + "attn.to_q") == block("single_blocks.7.linear1.weight[0:3072]"));
    CHECK(meaning(names, s + "attn.to_k") == block("single_blocks.7.linear1.weight[3072:6144]"));
    CHECK(meaning(names, s + "proj_mlp") == block("single_blocks.7.linear1.weight[9216:21504]"));
    CHECK(meaning(names, s + "proj_out") == block("single_blocks.7.linear2.weight"));
    CHECK(meaning(names, "lora_unet_double_blocks_0_img_attn_qkv") ==
          block("double_blocks.0.img_attn.qkv.weight"));
    CHECK(meaning(names, "lora_unet_single_blocks_7_linear1") == block("single_blocks.7.linear1.weight"));
    CHECK(meaning(names, "base_model.model.double_blocks.0.txt_mlp.2") ==
          block("double_blocks.0.txt_mlp.2.weight"));
    CHECK(meaning(names, "transformer.proj_out") == block("final_layer.linear.weight"));
    CHECK(meaning(names, "lora_transformer_proj_out") == block("final_layer.linear.weight"));
    CHECK(meaning(names, "lycoris_transformer_blocks_0_ff_net_2") ==
          block("double_blocks.0.img_mlp.2.weight"));
    CHECK(meaning(names, "lora_unet_time_in_in_layer") == block("time_in.in_layer.weight"));
    CHECK(meaning(names, "lora_unet_context_embedder_") ==
          block("txt_in.weight")); // TheLastBen's stray underscore
    CHECK(meaning(names, "double_blocks.0.img_attn.norm.query_norm") ==
          block("double_blocks.0.img_attn.norm.query_norm.scale"));
    CHECK(meaning(names, "diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale") ==
          block("double_blocks.0.img_attn.norm.key_norm.scale"));
    CHECK(meaning(names, t + "norm_q") == block("double_blocks.0.img_attn.norm.query_norm.scale"));
    CHECK(names.lacks_component("transformer.time_text_embed.guidance_embedder.linear_1")); // as schnell
}

TEST_CASE("cases 29 and 30: halves that diffusers swaps, the last block's of SD 3 alone") {
    const Names f = flux_names(), s = sd3_names();
    const LoraNames flux(f.list), sd3(s.list);
    CHECK(meaning(flux, "transformer.norm_out.linear") == UNET + "final_layer.adaLN_modulation.1.weight~");
    CHECK(meaning(flux, "transformer.norm_out.linear", "bias") ==
          UNET + "final_layer.adaLN_modulation.1.bias~");
    CHECK(meaning(flux, "lora_unet_final_layer_adaLN_modulation_1") ==
          UNET + "final_layer.adaLN_modulation.1.weight");
    CHECK(meaning(flux, "transformer.transformer_blocks.0.norm1.linear") ==
          UNET + "double_blocks.0.img_mod.lin.weight");
    CHECK(meaning(sd3, "transformer.norm_out.linear") == UNET + "final_layer.adaLN_modulation.1.weight~");
    CHECK(meaning(sd3, "transformer.transformer_blocks.22.norm1_context.linear") ==
          UNET + "joint_blocks.22.context_block.adaLN_modulation.1.weight");
    CHECK(meaning(sd3, "transformer.transformer_blocks.23.norm1_context.linear") ==
          UNET + "joint_blocks.23.context_block.adaLN_modulation.1.weight~");
    CHECK(meaning(sd3, "lora_unet_joint_blocks_23_context_block_adaLN_modulation_1") ==
          UNET + "joint_blocks.23.context_block.adaLN_modulation.1.weight");
}

TEST_CASE("case 31: the second attention of SD 3.5 medium") {
    const Names model = sd3_names();
    const LoraNames names(model.list);
    CHECK(meaning(names, "transformer.transformer_blocks.5.attn2.to_v") ==
          UNET + "joint_blocks.5.x_block.attn2.qkv.weight[3072:4608]");
    CHECK(meaning(names, "transformer.transformer_blocks.13.attn2.to_v") == "");
    CHECK(meaning(names, "lora_unet_joint_blocks_0_x_block_attn_qkv") ==
          UNET + "joint_blocks.0.x_block.attn.qkv.weight");
    CHECK(meaning(names, "lora_unet_x_embedder_proj") == UNET + "x_embedder.proj.weight");
    CHECK(meaning(names, "transformer.transformer_blocks.4.attn.add_k_proj") ==
          UNET + "joint_blocks.4.context_block.attn.qkv.weight[1536:3072]");
}

TEST_CASE("case 36: OneTrainer's FLUX modules do not collapse") {
    const Names model = flux_names();
    const LoraNames names(model.list);
    CHECK(meaning(names, "lora_transformer_transformer_blocks_0_ff_net_0_proj") ==
          UNET + "double_blocks.0.img_mlp.0.weight");
    CHECK(meaning(names, "lora_transformer_transformer_blocks_0_norm1_linear") ==
          UNET + "double_blocks.0.img_mod.lin.weight");
    CHECK(meaning(names, "lora_transformer_transformer_blocks_0_attn_to_q") ==
          UNET + "double_blocks.0.img_attn.qkv.weight[0:3072]");
    CHECK(meaning(names, "lora_transformer_single_transformer_blocks_0_proj_mlp") ==
          UNET + "single_blocks.0.linear1.weight[9216:21504]");
}

TEST_CASE("case 40: XLabs' processors") {
    const Names model = flux_names();
    const LoraNames names(model.list);
    for (const char * prefix : {"", "diffusion_model."}) {
        const std::string at = prefix;
        CHECK(meaning(names, at + "double_blocks.0.processor.qkv_lora1") ==
              UNET + "double_blocks.0.img_attn.qkv.weight");
        CHECK(meaning(names, at + "double_blocks.0.processor.qkv_lora2") ==
              UNET + "double_blocks.0.txt_attn.qkv.weight");
        CHECK(meaning(names, at + "double_blocks.0.processor.proj_lora2") ==
              UNET + "double_blocks.0.txt_attn.proj.weight");
        CHECK(meaning(names, at + "single_blocks.3.processor.qkv") ==
              UNET + "single_blocks.3.linear1.weight[0:9216]");
        CHECK(meaning(names, at + "single_blocks.3.processor.proj") ==
              UNET + "single_blocks.3.linear2.weight");
    }
}

TEST_CASE("no table of names has a collision, and one that had would say so") {
    for (const Names & model : {sd1_names(), sd2_names(), sdxl_names(), flux_names(), sd3_names()}) {
        CHECK(LoraNames(model.list).size() > 1000);
    }
    Names twice;
    twice.root(UNET, "unet.").linear("a.b", "x", 8, 8).linear("a_b", "y", 8, 8);
    CHECK(contains(complaint([&] { LoraNames names(twice.list); }, Status::internal), "means both"));
}

TEST_CASE("nothing is found by a part of its name") {
    const Names model = sd1_names();
    const LoraNames names(model.list);
    for (const char * stem :
         {"", ".", "lora_unet_", "unet.", "lora_unet_conv", "conv_in.", "text_encoder", "base_model.model.",
          "lora_unet_time_embedding_linear_1_weight", "unet.conv_in.weight"}) {
        CAPTURE(stem);
        CHECK(meaning(names, stem) == "");
    }
}
