#include "lora_files.h"

#include "core/json.h"

#include <algorithm>
#include <cmath>
#include <limits>

using namespace sd;
using namespace sd::test;

namespace {

const std::string TO_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q";
const std::string TO_K2 = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k";
const std::string CONV1 = "lora_unet_down_blocks_0_resnets_0_conv1";
const std::string Q_PATH = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q";
const std::string TEXT_Q = "lora_te_text_model_encoder_layers_0_self_attn_q_proj";

const Names & sd1() {
    static const Names NAMES = sd1_names();
    return NAMES;
}

LoraFile read_bytes(const std::string & bytes, const Names & model = sd1(),
                    const std::string & what = "SD1") {
    const Folder folder;
    return read_lora(folder.write("pencil.safetensors", bytes), LoraNames(model.list), what);
}

LoraFile read(const LoraWriter & file, const Names & model = sd1(), const std::string & what = "SD1") {
    return read_bytes(file.bytes(), model, what);
}

LoraModule only(const LoraFile & file) {
    REQUIRE(file.modules.size() == 1);
    CHECK(file.report.applied.size() == 1);
    CHECK(file.report.skipped.empty());
    return file.modules[0];
}

std::string refusal(const LoraWriter & file, Status status = Status::bad_file, const Names & model = sd1(),
                    const std::string & what = "SD1") {
    return complaint([&] { read(file, model, what); }, status);
}

// The sentence about the only module that was skipped, in a file with another sound one.
std::string skipped(LoraWriter file) {
    const LoraFile out = read(file.kohya("lora_unet_conv_out", {2, 320, 3, 3}, {4, 2, 1, 1}));
    REQUIRE(out.report.skipped.size() == 1);
    CHECK(out.modules.size() == 1);
    return out.report.skipped[0];
}

LoraWriter pair(double alpha = 0) { return LoraWriter().kohya(TO_Q, {4, 320}, {320, 4}, alpha); }

std::string where(const LoraModule & module) { return module.target.weight->name.substr(22); }

using Shape64 = std::vector<int64_t>;

Shape64 shape(const LoraModule & module, const char * role) { return module.factors.at(role).shape; }

} // namespace

TEST_CASE("cases 1 to 5, 43: the scale of one pair") {
    const LoraModule half = only(read(pair(2)));
    CHECK(where(half) == "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight");
    CHECK(half.kind == LoraKind::low_rank);
    CHECK(half.scale == 0.5);
    CHECK(shape(half, "down") == Shape64{4, 320});
    CHECK(shape(half, "up") == Shape64{320, 4});
    CHECK(half.target.rows == 320);
    CHECK(only(read(pair())).scale == 1);
    CHECK(only(read(pair().add(TO_Q + ".alpha", "BF16", {1}, little(0x4080, 2)))).scale == 1);
    CHECK(only(read(pair().add(TO_Q + ".alpha", "I64", {}, little(4, 8)))).scale == 1);
    const double exact = 0.1;
    CHECK(only(read(pair().add(TO_Q + ".alpha", "F64", {}, raw(&exact, 8)))).scale == 0.025);
    CHECK(only(read(LoraWriter().kohya(TO_Q, {128, 320}, {320, 128}, 1))).scale == 1.0 / 128);
    CHECK(only(read(LoraWriter().kohya(TO_Q, {1, 320}, {320, 1}, 1))).scale == 1);
    CHECK(only(read(pair(2).add(TO_Q + ".scale", {}, {0.25f}))).scale == 0.25);
    CHECK(only(read(pair(2).add(TO_Q + ".scalar", {1}, {3.0f}))).scale == 1.5);
    CHECK(only(read(pair(-4))).scale == -1);

    const LoraFile unset = read(pair().add(TO_Q + ".alpha", {}, {0.0f}));
    CHECK(only(unset).scale == 1);
    CHECK(contains(unset.report.warnings.at(0), "alpha of 0"));
}

TEST_CASE("case 6: an alpha that is no number rejects its module, no other") {
    const float bad[] = {NAN, INFINITY, -INFINITY};
    for (const float alpha : bad) {
        CHECK(contains(skipped(pair().add(TO_Q + ".alpha", {}, {alpha})), "alpha is no finite number"));
    }
    CHECK(contains(skipped(pair().add(TO_Q + ".alpha", {2}, {1.0f, 2.0f})), "alpha is no finite number"));
    CHECK(contains(skipped(pair().add(TO_Q + ".scale", {}, {NAN})), "scale is no finite number"));
}

TEST_CASE("cases 7 and 8: matrices where the model has 1x1 convolutions, and the other way round") {
    const LoraModule flat =
        only(read(LoraWriter().kohya("lora_unet_mid_block_attentions_0_proj_in", {8, 1280}, {1280, 8})));
    CHECK(where(flat) == "middle_block.1.proj_in.weight");
    CHECK(shape(flat, "down") == Shape64{8, 1280});
    const std::string proj = "lora_unet_down_blocks_0_attentions_0_proj_in";
    const LoraModule squeezed =
        only(read(LoraWriter().kohya(proj, {8, 320, 1, 1}, {320, 8, 1, 1}), sd2_names(), "SD2"));
    CHECK(shape(squeezed, "down") == Shape64{8, 320});
    CHECK(shape(squeezed, "up") == Shape64{320, 8});
}

TEST_CASE("cases 10 to 12: convolutions, with and without a core") {
    const LoraModule plain = only(read(LoraWriter().kohya(CONV1, {4, 320, 3, 3}, {320, 4, 1, 1}, 4)));
    CHECK(shape(plain, "down") == Shape64{4, 320, 3, 3});
    CHECK(shape(plain, "up") == Shape64{320, 4});
    LoraWriter tucker =
        LoraWriter().kohya("lora_unet_down_blocks_1_resnets_0_conv1", {4, 320, 1, 1}, {640, 4, 1, 1});
    tucker.add("lora_unet_down_blocks_1_resnets_0_conv1.lora_mid.weight", {4, 4, 3, 3});
    const LoraModule core = only(read(tucker));
    CHECK(shape(core, "down") == Shape64{4, 320});
    CHECK(shape(core, "mid") == Shape64{4, 4, 3, 3});
    CHECK(where(only(read(LoraWriter().kohya("lora_unet_input_blocks_3_0_op", {4, 320, 3, 3},
                                             {320, 4, 1, 1})))) == "input_blocks.3.0.op.weight");
    CHECK(contains(skipped(LoraWriter().kohya(CONV1, {4, 320, 1, 1}, {320, 4, 1, 1})),
                   "a kernel of 1x1, where the weight has 3x3"));
    CHECK(contains(skipped(LoraWriter().kohya(CONV1, {4, 320}, {320, 4})), "holds no kernels of 3x3"));
}

TEST_CASE("cases 13 and 14: LoHa, its transposed factors with a core") {
    LoraWriter loha;
    for (const char * w : {"1", "2"}) {
        loha.add(TO_K2 + ".hada_w" + w + "_a", {320, 4}).add(TO_K2 + ".hada_w" + w + "_b", {4, 768});
    }
    const LoraFile file = read(loha.add(TO_K2 + ".alpha", {}, {2.0f}));
    const LoraModule plain = only(file);
    CHECK(plain.kind == LoraKind::loha);
    CHECK(plain.scale == 0.5);
    CHECK(shape(plain, "w2_b") == Shape64{4, 768});
    CHECK(file.report.formats == std::map<std::string, int>{{"lycoris", 1}});

    const std::string conv = "lora_unet_down_blocks_1_resnets_0_conv1";
    LoraWriter tucker;
    for (const char * w : {"1", "2"}) {
        tucker.add(conv + ".hada_w" + w + "_a", {4, 640}).add(conv + ".hada_w" + w + "_b", {4, 320});
        tucker.add(conv + ".hada_t" + w, {4, 4, 3, 3});
    }
    const LoraModule core = only(read(tucker));
    CHECK(shape(core, "w1_a") == Shape64{4, 640});
    CHECK(shape(core, "t2") == Shape64{4, 4, 3, 3});
    LoraWriter half = LoraWriter().add(TO_K2 + ".hada_w1_a", {320, 4}).add(TO_K2 + ".hada_w1_b", {4, 768});
    CHECK(contains(skipped(half), "its hada_w2_a is missing"));
}

TEST_CASE("cases 15 to 18: LoKr in its ways of storage") {
    const auto lokr = [](const Shape64 & w1, const Shape64 & w2) {
        return LoraWriter()
            .add(TO_Q + ".lokr_w1", w1)
            .add(TO_Q + ".lokr_w2", w2)
            .add(TO_Q + ".alpha", {}, {123.0f});
    };
    CHECK(only(read(lokr({8, 8}, {40, 40}))).scale == 1);
    CHECK(only(read(lokr({8, 8}, {40, 40}))).kind == LoraKind::lokr);
    CHECK(shape(only(read(lokr({40, 8}, {8, 40}))), "w1") == Shape64{40, 8});
    CHECK(contains(skipped(lokr({8, 8}, {40, 41})),
                   "the product of 8x8 and 40x41, where the weight is 320x320"));
    CHECK(contains(skipped(lokr({8, 7}, {40, 40})), "the product of 8x7"));

    LoraWriter half = LoraWriter().add(TO_Q + ".lokr_w1", {4, 4}).add(TO_Q + ".alpha", {}, {1.0f});
    half.add(TO_Q + ".lokr_w2_a", {80, 2}).add(TO_Q + ".lokr_w2_b", {2, 80});
    CHECK(only(read(half)).scale == 0.5);
    LoraWriter both = LoraWriter().add(TO_Q + ".lokr_w1_a", {4, 2}).add(TO_Q + ".lokr_w1_b", {2, 4});
    both.add(TO_Q + ".lokr_w2_a", {80, 4}).add(TO_Q + ".lokr_w2_b", {4, 80}).add(TO_Q + ".alpha", {}, {1.0f});
    CHECK(only(read(both)).scale == 0.25);

    LoraWriter conv = LoraWriter().add(CONV1 + ".lokr_w1", {8, 8}).add(CONV1 + ".lokr_w2", {40, 40, 3, 3});
    CHECK(shape(only(read(conv)), "w2") == Shape64{40, 40, 3, 3});
    LoraWriter flat = LoraWriter().add(CONV1 + ".lokr_w1", {8, 8}).add(CONV1 + ".lokr_w2_a", {40, 2});
    CHECK(shape(only(read(flat.add(CONV1 + ".lokr_w2_b", {2, 360}))), "w2_b") == Shape64{2, 360});
    LoraWriter core = LoraWriter().add(CONV1 + ".lokr_w1", {8, 8}).add(CONV1 + ".lokr_w2_a", {2, 40});
    core.add(CONV1 + ".lokr_w2_b", {2, 40}).add(CONV1 + ".lokr_t2", {2, 2, 3, 3});
    CHECK(shape(only(read(core)), "t2") == Shape64{2, 2, 3, 3});
}

TEST_CASE("cases 19 to 21: DoRA in all spellings, by rows and by columns") {
    const auto magnitude = [](const std::string & suffix, const Shape64 & shape) {
        return only(read(pair().add(TO_Q + suffix, shape)));
    };
    CHECK_FALSE(magnitude(".dora_scale", {320, 1}).magnitude_of_columns);
    CHECK(magnitude(".dora_scale", {1, 320}).magnitude_of_columns);
    CHECK_FALSE(magnitude(".dora_scale", {320}).magnitude_of_columns);
    CHECK(magnitude(".dora_scale", {320, 1}).magnitude->shape == Shape64{320});
    CHECK_FALSE(magnitude(".magnitude", {320}).magnitude_of_columns);
    for (const char * suffix : {".lora_magnitude_vector", ".lora_magnitude_vector.weight",
                                ".lora_magnitude_vector.default.weight"}) {
        LoraWriter peft = LoraWriter().peft(Q_PATH, {4, 320}, {320, 4}).add(Q_PATH + suffix, {320});
        const LoraFile file = read(peft);
        const LoraModule module = only(file);
        CHECK(module.magnitude.has_value());
        CHECK_FALSE(module.magnitude_of_columns);
        CHECK(file.report.kinds.count("lora with dora") == 1);
    }
    LoraWriter conv = LoraWriter().peft("unet.down_blocks.0.resnets.0.conv1", {4, 320, 3, 3}, {320, 4, 1, 1});
    CHECK_FALSE(
        only(read(conv.add("unet.down_blocks.0.resnets.0.conv1.lora_magnitude_vector", {1, 320, 1, 1})))
            .magnitude_of_columns);
    LoraWriter k = LoraWriter().kohya(TO_K2, {4, 768}, {320, 4}).add(TO_K2 + ".dora_scale", {1, 768});
    CHECK(only(read(k)).magnitude_of_columns);
    CHECK(contains(skipped(pair().add(TO_Q + ".dora_scale", {321, 1})), "its magnitude is 321x1"));
}

TEST_CASE("case 22: IA3 by its on_input, and never by a weight alone") {
    const std::string k = TO_K2, q = TO_Q;
    const auto ia3 = [&](const Shape64 & shape, float on_input) {
        return LoraWriter().add(k + ".weight", shape).add(k + ".on_input", {}, {on_input});
    };
    CHECK(only(read(ia3({768}, 1))).on_input);
    CHECK_FALSE(only(read(ia3({320}, 0))).on_input);
    CHECK(only(read(ia3({1, 768, 1, 1}, 1))).kind == LoraKind::ia3);
    CHECK(contains(skipped(ia3({320}, 1)), "where 768 elements are due"));
    const LoraFile rule =
        read(ia3({768}, 1)
                 .add(q + "_x.weight", {1})
                 .add("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v.weight", {1280}));
    CHECK(rule.modules.size() == 2);
    CHECK(contains(skipped(LoraWriter().add(k + ".weight", {320})), "nothing says that it is IA3"));

    LoraWriter peft =
        LoraWriter().add("base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.ia3_l",
                         {320, 1}, std::vector<float>(320, 1.25f));
    const LoraModule factor = only(read(peft));
    CHECK_FALSE(factor.on_input);
    CHECK(factor.factors.at("weight").data[0] == 0.25f);
    LoraWriter out = LoraWriter().add(
        "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0.ia3_l", {320, 1});
    CHECK(read(out).modules.size() == 2); // and the bias
}

TEST_CASE("cases 23 and 24: norms, biases, whole differences") {
    const std::string norm = "lora_unet_down_blocks_0_resnets_0_norm1";
    const LoraFile file = read(LoraWriter().add(norm + ".w_norm", {320}).add(norm + ".b_norm", {320}));
    REQUIRE(file.modules.size() == 2);
    CHECK(where(file.modules[0]) == "input_blocks.1.0.in_layers.0.bias");
    CHECK(where(file.modules[1]) == "input_blocks.1.0.in_layers.0.weight");
    CHECK(file.modules[0].kind == LoraKind::dense);
    CHECK(where(only(read(LoraWriter().add("diffusion_model.input_blocks.1.0.in_layers.2.diff_b", {320})))) ==
          "input_blocks.1.0.in_layers.2.bias");
    CHECK(where(only(read(LoraWriter().add(norm + ".diff", {320})))) ==
          "input_blocks.1.0.in_layers.0.weight");
    CHECK(shape(only(read(LoraWriter().add(CONV1 + ".diff", {320, 320, 3, 3}))), "diff") ==
          Shape64{320, 320, 3, 3});
    CHECK(only(read(LoraWriter().add(TO_Q + ".set_weight", {320, 320}))).kind == LoraKind::replace);
    CHECK(contains(skipped(LoraWriter().add(TO_Q + ".diff_b", {320})), "no such parameter in this model"));
    CHECK(contains(skipped(LoraWriter().add(TO_Q + ".diff", {320, 321})), "takes 321 inputs"));

    LoraWriter peft = LoraWriter().peft("unet.mid_block.attentions.0.proj_in", {4, 1280}, {1280, 4});
    peft.add("unet.mid_block.attentions.0.proj_in.lora_B.bias", {1280})
        .add("unet.mid_block.attentions.0.proj_in.alpha", {}, {8.0f});
    const LoraFile with_bias = read(peft);
    REQUIRE(with_bias.modules.size() == 2);
    for (const LoraModule & module : with_bias.modules) {
        CHECK(module.scale == 2);
    }
}

TEST_CASE("GLoRA in both layouts") {
    const auto glora = [](const Shape64 & a1, const Shape64 & a2, const Shape64 & b1, const Shape64 & b2) {
        return LoraWriter()
            .add(TO_K2 + ".a1.weight", a1)
            .add(TO_K2 + ".a2.weight", a2)
            .add(TO_K2 + ".b1.weight", b1)
            .add(TO_K2 + ".b2.weight", b2)
            .add(TO_K2 + ".alpha", {}, {2.0f});
    };
    for (const LoraModule & module : {only(read(glora({768, 4}, {4, 768}, {320, 4}, {4, 768}))),
                                      only(read(glora({4, 768}, {768, 4}, {4, 768}, {320, 4})))}) {
        CHECK(shape(module, "a1") == Shape64{768, 4});
        CHECK(shape(module, "a2") == Shape64{4, 768});
        CHECK(shape(module, "b1") == Shape64{320, 4});
        CHECK(shape(module, "b2") == Shape64{4, 768});
        CHECK(module.scale == 0.5);
    }
}

TEST_CASE("OFT and BOFT, and where their limits come from") {
    const LoraModule oft =
        only(read(LoraWriter().add(TO_Q + ".oft_blocks", {10, 32, 32}).add(TO_Q + ".alpha", {}, {0.5f})));
    CHECK(oft.kind == LoraKind::oft);
    CHECK(oft.constraint == 160.0);
    CHECK_FALSE(
        only(read(LoraWriter().add(TO_Q + ".oft_blocks", {10, 32, 32}).add(TO_Q + ".alpha", {}, {0.0f})))
            .constraint.has_value());
    const LoraModule boft =
        only(read(LoraWriter().add(TO_Q + ".oft_blocks", {3, 40, 8, 8}).add(TO_Q + ".rescale", {320, 1})));
    CHECK(boft.kind == LoraKind::boft);
    CHECK(shape(boft, "rescale") == Shape64{320});
    CHECK(contains(skipped(LoraWriter().add(TO_Q + ".oft_blocks", {9, 32, 32})), "do not rotate 320 rows"));
    const LoraModule input = only(read(LoraWriter().add(Q_PATH + ".oft_R.weight", {10, 496})));
    CHECK(input.kind == LoraKind::oft_input);
    CHECK(shape(only(read(LoraWriter().add(Q_PATH + ".oft_R.weight", {1, 496}))), "rotation") ==
          Shape64{10, 496});
    CHECK(contains(skipped(LoraWriter().add(Q_PATH + ".oft_R.weight", {10, 495})),
                   "does not rotate 320 inputs"));

    const std::string single = "oft_unet_single_blocks_0_linear1";
    LoraWriter parts =
        LoraWriter().add(single + ".oft_blocks.0", {768, 4, 4}).add(single + ".oft_blocks.3", {3072, 4, 4});
    const LoraFile file = read(parts, flux_names(), "FLUX");
    REQUIRE(file.modules.size() == 2);
    CHECK(file.modules[1].target.first_row == 9216);
    CHECK(file.modules[1].target.rows == 12288);
}

TEST_CASE("cases 25, 26 and 28: FLUX's split and fused modules, each with its own scale") {
    const std::string single = "transformer.single_transformer_blocks.0.";
    LoraWriter file = LoraWriter()
                          .peft(single + "attn.to_q", {8, 3072}, {3072, 8})
                          .add(single + "attn.to_q.alpha", {}, {8.0f});
    file.peft(single + "attn.to_k", {16, 3072}, {3072, 16}).add(single + "attn.to_k.alpha", {}, {4.0f});
    file.peft(single + "proj_mlp", {4, 3072}, {12288, 4});
    const LoraFile out = read(file, flux_names(), "FLUX");
    REQUIRE(out.modules.size() == 3);
    CHECK(out.modules[0].scale == 0.25);
    CHECK(out.modules[0].target.first_row == 3072);
    CHECK(out.modules[1].scale == 1);
    CHECK(out.modules[1].target.first_row == 0);
    CHECK(out.modules[2].target.first_row == 9216);
    CHECK(out.modules[2].target.rows == 12288);
    CHECK(out.report.base_model == "FLUX");
    const LoraFile fused =
        read(LoraWriter().kohya("lora_unet_double_blocks_0_img_attn_qkv", {48, 3072}, {9216, 48}, 16),
             flux_names(), "FLUX");
    CHECK(only(fused).scale == 1.0 / 3);
}

TEST_CASE("case 32: an input embedding that lacks inputs is padded, no other module is") {
    LoraWriter turbo = LoraWriter()
                           .peft("transformer.x_embedder", {2, 64}, {3072, 2})
                           .peft("transformer.proj_out", {2, 3072}, {64, 2});
    const LoraFile flux = read(turbo, flux_names(true, 384), "FLUX");
    REQUIRE(flux.modules.size() == 2);
    CHECK(flux.report.padded == std::vector<std::string>{"transformer.x_embedder: 64 of 384 input features"});
    const Factor & down = flux.modules[1].factors.at("down");
    CHECK(down.shape == Shape64{2, 384});
    CHECK(down.data[63] != 0);
    CHECK(down.data[64] == 0);
    CHECK(down.data[384] != 0);

    const LoraFile inpaint =
        read(LoraWriter().kohya("lora_unet_conv_in", {2, 4, 3, 3}, {320, 2, 1, 1}), sd1_names(9));
    CHECK(shape(only(inpaint), "down") == Shape64{2, 9, 3, 3});
    CHECK(only(inpaint).factors.at("down").data[36] == 0);
    CHECK(inpaint.report.padded.size() == 1);
    CHECK(contains(skipped(LoraWriter().kohya("lora_unet_conv_in", {2, 9, 3, 3}, {320, 2, 1, 1})),
                   "takes 9 inputs"));
    CHECK(contains(skipped(LoraWriter().kohya(TO_Q, {2, 300}, {320, 2})), "takes 300 inputs"));
}

TEST_CASE("case 33: a control LoRA on a model without its inputs") {
    LoraWriter control = LoraWriter()
                             .peft("img_in", {128, 128}, {3072, 128})
                             .add("single_blocks.0.norm.key_norm.scale", {128});
    const LoraFile file = read(control.add("img_in.lora_B.bias", {3072}), flux_names(), "FLUX");
    CHECK(file.modules.front().inputs == 128); // which Context refuses without a picture
    CHECK(shape(file.modules.front(), "down") == Shape64{128, 128});
    CHECK(std::any_of(file.report.warnings.begin(), file.report.warnings.end(), [](const std::string & warning) {
        return contains(warning, "takes 128 input features, 64 of them of a picture to follow");
    }));
    CHECK(file.modules.back().kind == LoraKind::replace);
    LoraWriter fill = LoraWriter().peft("img_in", {4, 384}, {3072, 4}).peft("double_blocks.0.img_mlp.2", {4, 12288}, {3072, 4});
    CHECK(contains(read(fill, flux_names(), "FLUX").report.skipped.at(0), "takes 384 inputs"));
}

TEST_CASE("case 42: a LoRA for another model is refused whole, and says by which numbers") {
    const std::string hf = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_";
    LoraWriter xl;
    xl.kohya(hf + "attn1_to_q", {4, 640}, {640, 4}).kohya(hf + "attn1_to_k", {4, 640}, {640, 4});
    xl.kohya(hf + "attn1_to_v", {4, 640}, {640, 4}).kohya(hf + "attn2_to_k", {4, 2048}, {640, 4});
    CHECK(contains(refusal(xl), "pencil.safetensors: made for SDXL, but the model is SD1 (attn2.to_k takes "
                                "2048 inputs here, 768 there)"));
    LoraWriter one;
    one.kohya(TO_Q, {4, 320}, {320, 4}).kohya(TO_K2, {4, 768}, {320, 4}).kohya(TEXT_Q, {4, 768}, {768, 4});
    CHECK(contains(refusal(one, Status::bad_file, sd2_names(), "SD2"),
                   "made for SD1, but the model is SD2 (attn2.to_k takes 768 inputs here, 1024 there)"));
    CHECK(contains(refusal(one, Status::bad_file, sdxl_names(), "SDXL"),
                   "made for SD1, but the model is SDXL"));

    LoraWriter flux = LoraWriter().kohya("lora_unet_double_blocks_0_img_attn_qkv", {4, 3072}, {9216, 4});
    flux.kohya("lora_te1_text_model_encoder_layers_0_mlp_fc1", {4, 768}, {3072, 4});
    CHECK(contains(
        refusal(flux),
        "made for FLUX, but the model is SD1 (2 of its keys mean nothing there, first lora_unet_double"));
    LoraWriter sd3 =
        LoraWriter().peft("transformer.transformer_blocks.0.norm1_context.linear", {4, 1536}, {9216, 4});
    CHECK(contains(refusal(sd3), "made for SD3, but the model is SD1"));

    LoraWriter stated = LoraWriter()
                            .kohya("lora_unet_foo", {4, 4}, {4, 4})
                            .metadata("ss_base_model_version", "\"sdxl_base_v1-0\"");
    CHECK(contains(refusal(stated), "made for SDXL, but the model is SD1"));
    LoraWriter t5 =
        LoraWriter().kohya("lora_te3_encoder_block_0_layer_0_SelfAttention_q", {4, 4096}, {4096, 4});
    CHECK(contains(refusal(t5), "only components that are not there"));
}

TEST_CASE("case 44: factors of every float type") {
    std::vector<float> values(1280);
    std::string f8, f64, bf16, f16;
    for (size_t i = 0; i < values.size(); ++i) {
        values[i] = static_cast<float>(static_cast<int>(i % 15) - 7) / 4;
        const double wide = values[i];
        f64 += raw(&wide, 8);
        bf16 += little(f32_to_bf16(values[i]), 2);
        f16 += little(f32_to_f16(values[i]), 2);
        for (int code = 0; code < 256; ++code) {
            if (f8_e4m3_to_f32(static_cast<uint8_t>(code)) == values[i]) {
                f8 += static_cast<char>(code);
                break;
            }
        }
    }
    REQUIRE(f8.size() == values.size());
    const std::vector<float> exact = only(read(LoraWriter()
                                                   .add(TO_Q + ".lora_down.weight", {4, 320}, values)
                                                   .add(TO_Q + ".lora_up.weight", {320, 4})))
                                         .factors.at("down")
                                         .data;
    CHECK(exact == values);
    for (const auto & [type, bytes] :
         {std::pair<const char *, std::string>{"F8_E4M3", f8}, {"F64", f64}, {"BF16", bf16}, {"F16", f16}}) {
        CAPTURE(type);
        LoraWriter file = LoraWriter()
                              .add(TO_Q + ".lora_down.weight", type, {4, 320}, bytes)
                              .add(TO_Q + ".lora_up.weight", {320, 4});
        CHECK(only(read(file)).factors.at("down").data == values);
    }
    LoraWriter whole = LoraWriter()
                           .add(TO_Q + ".lora_down.weight", "I8", {4, 320}, std::string(1280, 1))
                           .add(TO_Q + ".lora_up.weight", {320, 4});
    CHECK(contains(skipped(whole), "of type i8"));
}

TEST_CASE("case 45: NaN or infinity in any factor fails the file and names the tensor") {
    for (const float bad : {NAN, INFINITY, -INFINITY}) {
        std::vector<float> values(1280, 0.5f);
        values[777] = bad;
        LoraWriter file = LoraWriter()
                              .add(TO_Q + ".lora_down.weight", {4, 320})
                              .add(TO_Q + ".lora_up.weight", {320, 4}, values);
        const std::string message = refusal(file);
        CHECK(contains(message,
                       "pencil.safetensors: tensor '" + TO_Q + ".lora_up.weight' holds NaN or infinity"));
    }
    CHECK(contains(refusal(pair().add(TO_Q + ".dora_scale", {320}, std::vector<float>(320, NAN))),
                   "dora_scale"));
}

TEST_CASE("cases 39 and 46: text encoders alone") {
    const LoraFile file =
        read(LoraWriter()
                 .kohya(TEXT_Q, {4, 768}, {768, 4})
                 .kohya("lora_te1_text_model_encoder_layers_1_mlp_fc1", {4, 768}, {3072, 4}));
    CHECK(file.report.text_modules == 2);
    CHECK(file.report.unet_modules == 0);
    CHECK(file.report.applied.size() == 2);
}

TEST_CASE("cases 47 and 48: what the metadata say of alpha and rank") {
    const std::string v = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_v";
    const auto config = [](const std::string & more) {
        return R"("{\"unet.r\":16,\"unet.lora_alpha\":32,\"unet.rank_pattern\":{\"attn1.to_q\":8},\"unet.alpha_pattern\":{\"attn1.to_q\":8})" +
               more + "}\"";
    };
    const auto file = [&](const std::string & more) {
        return LoraWriter()
            .peft(Q_PATH, {8, 320}, {320, 8})
            .peft(v, {16, 320}, {320, 16})
            .metadata("lora_adapter_metadata", config(more));
    };
    const LoraFile plain = read(file(""));
    REQUIRE(plain.modules.size() == 2);
    CHECK(plain.modules[0].scale == 1);
    CHECK(plain.modules[1].scale == 2);
    CHECK(plain.report.scale_min == 1);
    CHECK(plain.report.scale_max == 2);
    CHECK(plain.report.warnings.empty());
    CHECK(read(file(R"(,\"unet.use_rslora\":true)")).modules[1].scale == 8);
    const LoraFile both = read(file("").add(v + ".alpha", {}, {4.0f}));
    CHECK(both.modules[1].scale == 0.25);
    REQUIRE(both.report.warnings.size() == 1);
    CHECK(contains(both.report.warnings[0], "both as a tensor and in its metadata"));

    LoraWriter other = LoraWriter().peft(v, {4, 320}, {320, 4}).metadata("lora_adapter_metadata", config(""));
    const LoraFile conflict = read(other);
    CHECK(conflict.modules[0].scale == 8); // by the rank of the tensors
    CHECK(contains(conflict.report.warnings.at(0), "another rank"));
    CHECK(contains(refusal(pair().metadata("lora_adapter_metadata", "\"{\"")), "lora_adapter_metadata"));
}

TEST_CASE("F16: a PEFT folder by itself or by its file, and diffusers' own name in a folder") {
    const Folder folder;
    const std::string path = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q";
    const std::string file =
        folder.write("p/adapter_model.safetensors", LoraWriter().peft(path, {4, 320}, {320, 4}).bytes());
    const LoraNames names(sd1().list);
    CHECK(only(read_lora(folder.path("p"), names, "SD1")).scale == 1);
    folder.write("p/adapter_config.json",
                 R"({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "task_type": null})");
    CHECK(only(read_lora(folder.path("p"), names, "SD1")).scale == 2);
    CHECK(only(read_lora(file, names, "SD1")).scale == 2);
    CHECK(read_lora(file, names, "SD1").report.formats == std::map<std::string, int>{{"peft", 1}});
    folder.write("d/pytorch_lora_weights.safetensors", LoraWriter().peft(Q_PATH, {4, 320}, {320, 4}).bytes());
    CHECK(read_lora(folder.path("d"), names, "SD1").modules.size() == 1);
    folder.write("b/adapter_model.bin", "PK");
    CHECK(contains(complaint([&] { read_lora(folder.path("b"), names, "SD1"); }, Status::unsupported),
                   "pickle"));
    folder.write("e/x", "");
    CHECK(contains(complaint([&] { read_lora(folder.path("e"), names, "SD1"); }, Status::bad_file),
                   "is a folder without"));
    folder.write("p/adapter_config.json", "{");
    CHECK(
        contains(complaint([&] { read_lora(file, names, "SD1"); }, Status::bad_file), "adapter_config.json"));
}

TEST_CASE("F22: a GGUF LoRA, whose writer drops leading dimensions of 1") {
    const auto string = [](const std::string & text) { return little(text.size(), 8) + text; };
    const auto tensor = [&](const std::string & name, std::vector<int> ne, uint64_t offset) {
        std::string out = string(name) + little(ne.size(), 4);
        for (const int n : ne) {
            out += little(static_cast<uint64_t>(n), 8);
        }
        return out + little(0, 4) + little(offset, 8);
    };
    std::string bytes = "GGUF" + little(3, 4) + little(2, 8) + little(1, 8) + string("adapter.lora.alpha") +
                        little(6, 4) + little(0x40000000, 4);
    bytes += tensor(TO_Q + ".lora_down.weight", {320}, 0) + tensor(TO_Q + ".lora_up.weight", {1, 320}, 1280);
    bytes.resize((bytes.size() + 31) / 32 * 32 + 2560, '\0');
    const LoraModule module = only(read_bytes(bytes));
    CHECK(shape(module, "down") == Shape64{1, 320});
    CHECK(shape(module, "up") == Shape64{320, 1});
    CHECK(module.scale == 2);
}

TEST_CASE("case 49: one module under two names applies once if it is the same") {
    const std::string hf = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q";
    const std::string orig = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q";
    const std::vector<float> down(4 * 1280, 0.5f), up(1280 * 4, 0.25f), other(1280 * 4, 0.125f);
    const auto file = [&](const std::vector<float> & second) {
        return LoraWriter()
            .add(hf + ".lora_down.weight", {4, 1280}, down)
            .add(hf + ".lora_up.weight", {1280, 4}, up)
            .add(orig + ".lora_down.weight", {4, 1280}, down)
            .add(orig + ".lora_up.weight", {1280, 4}, second);
    };
    const LoraFile same = read(file(up)), different = read(file(other));
    CHECK(same.modules.size() == 1);
    CHECK(contains(same.report.warnings.at(0), "applied once"));
    CHECK(different.modules.size() == 2);
    CHECK(contains(different.report.warnings.at(0), "both are applied"));
}

TEST_CASE("case 61: a file of which nothing is known is an error") {
    const std::string message = refusal(LoraWriter().kohya("lora_unet_foo_bar", {4, 4}, {4, 4}));
    CHECK(contains(message, "does not fit this SD1 model (2 of its keys mean nothing there, first "
                            "lora_unet_foo_bar.lora_down.weight)"));
    CHECK(contains(refusal(LoraWriter().add("x", {1})), "none of its 1 keys is one of a LoRA, first x"));
    CHECK(contains(refusal(LoraWriter()), "has no tensors"));
}

TEST_CASE("missing halves, empty factors, lying shapes: the module is skipped, the file read on") {
    CHECK(contains(skipped(LoraWriter().add(TO_Q + ".lora_down.weight", {4, 320})), "its up is missing"));
    CHECK(contains(skipped(LoraWriter().add(TO_Q + ".lora_up.weight", {320, 4})), "its down is missing"));
    CHECK(contains(skipped(LoraWriter().kohya(TO_Q, {0, 320}, {320, 0})), "is empty"));
    CHECK(contains(skipped(LoraWriter().kohya(TO_Q, {4, 320}, {320, 5})),
                   "its up is 320x5, where 320x4 is due"));
    CHECK(contains(skipped(LoraWriter().kohya(TO_Q, {4, 320}, {321, 4})),
                   "its up is 321x4, where 320x4 is due"));
    CHECK(contains(skipped(LoraWriter().kohya(TO_Q, {4, 320, 3, 3}, {320, 4, 1, 1})), "a kernel of 3x3"));
    CHECK(contains(skipped(LoraWriter().kohya("lora_unet_conv_norm_out", {4, 320}, {320, 4})),
                   "the model has a vector"));
    CHECK(contains(skipped(LoraWriter().add(TO_Q + ".dora_scale", {320, 1})), "nothing of it is an update"));
    CHECK(
        contains(skipped(LoraWriter().add(TO_Q + ".oft_diag", {8, 40})), "of a kind that is not read here"));
    CHECK(contains(refusal(LoraWriter().kohya(TO_Q, {5000, 320}, {320, 5000}), Status::unsupported),
                   "has rank 5000, where 4096"));
    const LoraFile high = read(LoraWriter().kohya(TO_Q, {400, 320}, {320, 400}));
    CHECK(contains(high.report.warnings.at(0), "a rank above its weight's own"));
    LoraWriter table = LoraWriter().add(CONV1 + ".lora_embedding_A", {4, 320});
    CHECK(contains(skipped(table.add(CONV1 + ".lora_embedding_B", {320, 4})), "the model has a convolution"));
}

TEST_CASE("what is no LoRA is refused by its name") {
    const auto refused = [](const std::vector<std::string> & names, const std::string & what) {
        LoraWriter file;
        for (const std::string & name : names) {
            file.add(name, {2, 2});
        }
        const std::string message = refusal(file, Status::unsupported);
        CAPTURE(message);
        CHECK(contains(message, "pencil.safetensors: is "));
        CHECK(contains(message, what));
    };
    refused({"unet:0:up", "unet:0:down"}, "cloneofsimo");
    refused({"transformer_blocks.0.qkv_proj.lora_down", "transformer_blocks.0.smooth"}, "nunchaku");
    refused({"lllite_unet_input_blocks_1.down.0.weight"}, "ControlNet-LLLite");
    refused({"lora_controlnet", "input_blocks.0.0.down"}, "Control-LoRA");
    refused({"down_blocks.0.motion_modules.0.to_q.lora_down.weight"}, "AnimateDiff");
    refused({"lora_prior_unet_x.lora_down.weight"}, "Stable Cascade");
    refused({"id_encoder.x", "lora_weights.y"}, "PhotoMaker");
    refused({"ip_adapter.1.to_k_ip.weight", "image_proj.norm.weight"}, "IP-Adapter");
    refused({"double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight"}, "IP-Adapter");
    refused({"controlnet_cond_embedding.conv_in.weight"}, "ControlNet");
    refused({"emb_params"}, "textual inversion");
    refused({"string_to_param.*"}, "textual inversion");
    refused({"320.0.linear.0.weight"}, "hypernetwork");
    refused({"model.diffusion_model.out.0.weight", "first_stage_model.decoder.x.weight"},
            "a whole checkpoint");
    refused({"down_blocks.0.resnets.0.conv1.weight"}, "a denoiser");
    refused({"decoder.up.0.x.weight", "encoder.down.0.x.weight"}, "a VAE");
    refused({"text_model.encoder.layers.0.mlp.fc1.weight"}, "a text encoder");
    LoraWriter tokens = LoraWriter().add("clip_l", {4, 768}).add("clip_g", {4, 1280});
    CHECK(contains(refusal(tokens, Status::unsupported), "textual inversion"));
    CHECK(
        contains(complaint([] { read_bytes(std::string("PK\x03\x04") + "x/data.pkl"); }, Status::unsupported),
                 "pickle"));
    CHECK(contains(complaint([] { read_bytes(pair().bytes().substr(0, 3000)); }, Status::bad_file),
                   "ends after"));
}

TEST_CASE("F1, F7 to F9, F12, F14: one update in every spelling for SD 1") {
    const std::string path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.",
                      orig = "input_blocks.1.1.transformer_blocks.0.attn1.";
    struct Spelling {
        std::string down, up, format;
    };
    const Spelling SPELLINGS[] = {
        {TO_Q + ".lora_down.weight", TO_Q + ".lora_up.weight", "kohya"},
        {"lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_down.weight",
         "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_up.weight", "kohya"},
        {Q_PATH + ".lora_A.weight", Q_PATH + ".lora_B.weight", "peft"},
        {Q_PATH + ".lora_A.default.weight", Q_PATH + ".lora_B.default.weight", "peft"},
        {Q_PATH + ".lora_A", Q_PATH + ".lora_B", "peft"},
        {path + "to_q.lora_A.weight", path + "to_q.lora_B.weight", "peft"},
        {"base_model.model." + path + "to_q.lora_A.weight", "base_model.model." + path + "to_q.lora_B.weight",
         "peft"},
        {Q_PATH + ".lora.down.weight", Q_PATH + ".lora.up.weight", "old diffusers"},
        {path + "processor.to_q_lora.down.weight", path + "processor.to_q_lora.up.weight",
         "attention processor"},
        {"unet." + path + "processor.to_q_lora.down.weight", "unet." + path + "processor.to_q_lora.up.weight",
         "attention processor"},
        {"diffusion_model." + orig + "to_q.lora_down.weight",
         "diffusion_model." + orig + "to_q.lora_up.weight", "comfy"},
        {"model.diffusion_model." + orig + "to_q.lora_A.weight",
         "model.diffusion_model." + orig + "to_q.lora_B.weight", "peft"},
        {"lycoris_" + TO_Q.substr(10) + ".lora_down.weight", "lycoris_" + TO_Q.substr(10) + ".lora_up.weight",
         "lycoris"},
    };
    for (const Spelling & spelling : SPELLINGS) {
        CAPTURE(spelling.down);
        const LoraFile file = read(LoraWriter().add(spelling.down, {4, 320}).add(spelling.up, {320, 4}));
        const LoraModule module = only(file);
        CHECK(where(module) == orig + "to_q.weight");
        CHECK(module.scale == 1);
        CHECK(file.report.formats == std::map<std::string, int>{{spelling.format, 1}});
    }
    for (const char * stem :
         {"lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight|lora_te_text_model_encoder_"
          "layers_0_self_attn_q_proj.lora_up.weight",
          "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight|text_"
          "encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight",
          "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.down.weight|text_encoder.text_model."
          "encoder.layers.0.self_attn.to_q_lora.up.weight",
          "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.lora_down.weight|"
          "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.lora_up.weight"}) {
        const std::string both = stem;
        const size_t bar = both.find('|');
        const LoraFile file =
            read(LoraWriter().add(both.substr(0, bar), {4, 768}).add(both.substr(bar + 1), {768, 4}));
        CHECK(only(file).target.weight->name ==
              "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight");
        CHECK(file.report.text_modules == 1);
    }
    LoraWriter embedding =
        LoraWriter().add("text_encoder.text_model.embeddings.token_embedding.lora_embedding_A", {2, 49408});
    const LoraModule table = only(
        read(embedding.add("text_encoder.text_model.embeddings.token_embedding.lora_embedding_B", {768, 2})));
    CHECK(shape(table, "down") == Shape64{2, 768});
    CHECK(shape(table, "up") == Shape64{49408, 2});
}

TEST_CASE("two adapters of one file stay apart") {
    LoraWriter file;
    for (const char * name : {"one", "two"}) {
        const std::string adapter = name;
        file.add(Q_PATH + ".lora_A." + adapter + ".weight", {4, 320})
            .add(Q_PATH + ".lora_B." + adapter + ".weight", {320, 4});
    }
    CHECK(read(file).modules.size() == 2);
}

TEST_CASE("the report accounts for every key, and is valid JSON") {
    LoraWriter file = pair(2).kohya("lora_te2_text_model_encoder_layers_0_mlp_fc1", {4, 1280}, {5120, 4});
    file.kohya(TEXT_Q, {8, 768}, {768, 8})
        .add("bundle_emb.token.clip_l", {1, 768})
        .add("odd\\u0001\\\"key", {1});
    file.add("text_model.embeddings.position_ids", "I64", {1}, little(0, 8))
        .metadata("ss_note", R"("a\"b\n\u00e9")");
    const LoraFile out = read(file);
    const LoraReport & report = out.report;
    CHECK(report.applied.size() == 2);
    CHECK(report.absent.size() == 2);
    CHECK(report.unmatched == std::vector<std::string>{"odd?\"key"});
    CHECK(contains(report.warnings.at(0), "1 tensors of textual inversions"));
    CHECK(report.ranks == std::map<int64_t, int>{{4, 1}, {8, 1}});
    CHECK(report.kinds == std::map<std::string, int>{{"lora", 2}});
    CHECK(report.scale_min == 0.5);
    CHECK(report.scale_max == 1);
    CHECK(out.bytes == 4 * (4 * 640 + 8 * 1536));

    const Json json = Json::parse(report_json(report), "report");
    CHECK(json.find("ranks")->find("8")->integer() == 1);
    CHECK(json.find("scale_min")->number() == 0.5);
    CHECK(*json.find("unmatched")->array()->at(0).string() == "odd?\"key");
    CHECK(*json.find("metadata")->find("ss_note")->string() == "a\"b\n\u00e9");
    CHECK(json.object()->size() == 17);
}

TEST_CASE("modules come in one order, whatever the file's") {
    const std::string k = TO_K2;
    const LoraFile a = read(LoraWriter().kohya(k, {4, 768}, {320, 4}).kohya(TO_Q, {4, 320}, {320, 4}));
    const LoraFile b = read(LoraWriter().kohya(TO_Q, {4, 320}, {320, 4}).kohya(k, {4, 768}, {320, 4}));
    REQUIRE(a.modules.size() == 2);
    CHECK(a.modules[0].stem == b.modules[0].stem);
    CHECK(a.modules[1].stem == b.modules[1].stem);
}
