#include "files.h"

#include <algorithm>
#include <thread>

using namespace sd;
using namespace sd::test;

namespace {

// A diffusers folder with one tensor per component.
void write_pipeline(const Folder & folder) {
    folder.write("p/model_index.json", R"({"_class_name": "StableDiffusionPipeline"})");
    folder.write("p/unet/diffusion_pytorch_model.safetensors",
                 safetensors_of({"conv_in.weight", "down_blocks.0.x"}));
    folder.write(
        "p/unet/config.json",
        R"({"attention_head_dim": [5, 10], "act_fn": "silu", "center": false, "x": null, "y": [[1]], "e": 1e-5})");
    folder.write("p/vae/diffusion_pytorch_model.fp16.safetensors",
                 safetensors_of({"decoder.mid_block.attentions.0.key.bias"}));
    folder.write("p/vae/config.json", R"({"scaling_factor": 0.18215})");
    folder.write("p/text_encoder/model.safetensors", safetensors_of({"text_model.final_layer_norm.weight"}));
    folder.write("p/text_encoder/config.json", R"({"num_hidden_layers": 12})");
    folder.write("p/scheduler/scheduler_config.json",
                 R"({"prediction_type": "v_prediction", "beta_end": 0.012})");
    folder.write("p/safety_checker/model.safetensors", "nobody opens this");
}

// The names that a component's file leads to, over a main file with all three components.
std::vector<std::string> names_with(const std::string & role, const std::vector<std::string> & names) {
    Folder            folder;
    const std::string main =
        folder.write("main.safetensors",
                     safetensors_of({"model.diffusion_model.out.0.weight", "first_stage_model.decoder.x",
                                     "cond_stage_model.transformer.text_model.x", "alphas_cumprod"}));
    const Checkpoint file =
        Checkpoint::open(main, {{role, folder.write("part.safetensors", safetensors_of(names))}});
    std::vector<std::string> out;
    for (const StoredTensor & tensor : file.tensors()) {
        CHECK(file.find(tensor.name) == &tensor);
        out.push_back(tensor.name);
    }
    std::sort(out.begin(), out.end());
    return out;
}

using Names = std::vector<std::string>;

} // namespace

TEST_CASE("files are told apart by what they hold, not by their names") {
    Folder folder;
    CHECK(Checkpoint::open(folder.write("a.ckpt", safetensors_of({"x"}))).has("x"));
    const auto wrong = [&](const std::string & bytes, Status status = Status::bad_file) {
        return open_complaint(folder.write("b.safetensors", bytes), status);
    };
    CHECK(contains(wrong(std::string("PK\x03\x04") + "archive/data.pkl", Status::unsupported),
                   "convert it with sdcpp convert"));
    CHECK(contains(wrong("\x80\x02}q", Status::unsupported), "pickle"));
    CHECK(contains(wrong("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"));
    CHECK(contains(wrong("<!DOCTYPE html>"), "web page"));
    CHECK(contains(wrong("hello, world"), "neither a safetensors nor a GGUF file (12 bytes)"));
    CHECK(contains(wrong("x"), "neither"));
    CHECK(contains(wrong("GGU"), "neither"));
    CHECK(contains(wrong("GGUF"), "inside its header"));
    CHECK(contains(wrong(""), "is empty"));
    CHECK(contains(open_complaint(folder.path("none.gguf"), Status::io),
                   "none.gguf: cannot be opened: No such file"));
    CHECK(contains(open_complaint("", Status::bad_argument), "no model given"));
    CHECK(contains(open_complaint(folder.path(), Status::bad_argument), "folder without model_index.json"));
}

TEST_CASE("a diffusers folder is one checkpoint") {
    Folder folder;
    write_pipeline(folder);
    const Checkpoint file = Checkpoint::open(folder.path("p"));
    CHECK(file.tensors().size() == 4);
    CHECK(file.has("unet.conv_in.weight"));
    CHECK(file.has("vae.decoder.mid_block.attentions.0.to_k.bias"));
    CHECK(file.has("text_encoder.text_model.final_layer_norm.weight"));
    const std::map<std::string, std::string> expected = {{"prediction_type", "v_prediction"},
                                                         {"text_encoder.num_hidden_layers", "12"},
                                                         {"unet.act_fn", "silu"},
                                                         {"unet.attention_head_dim", "5,10"},
                                                         {"unet.center", "false"},
                                                         {"unet.e", "1e-05"},
                                                         {"vae.scaling_factor", "0.18215"}};
    CHECK(file.metadata() == expected);
}

TEST_CASE("CLIP as transformers 5 saves it gets its usual names") {
    Folder folder;
    write_pipeline(folder);
    folder.write("p/text_encoder/model.safetensors",
                 safetensors_of({"embeddings.token_embedding.weight", "encoder.layers.0.mlp.fc1.bias",
                                 "final_layer_norm.bias", "text_projection.weight"}));
    const Checkpoint file = Checkpoint::open(folder.path("p"));
    CHECK(file.has("text_encoder.text_model.embeddings.token_embedding.weight"));
    CHECK(file.has("text_encoder.text_model.encoder.layers.0.mlp.fc1.bias"));
    CHECK(file.has("text_encoder.text_model.final_layer_norm.bias"));
    CHECK(file.has("text_encoder.text_projection.weight"));
}

TEST_CASE("sharded components are put together, from their own folder only") {
    Folder folder;
    write_pipeline(folder);
    std::filesystem::remove(folder.path("p/unet/diffusion_pytorch_model.safetensors"));
    folder.write("p/unet/1.safetensors", safetensors_of({"a"}));
    folder.write("p/unet/2.safetensors", safetensors_of({"b", "c"}));
    const auto index = [&](const std::string & map) {
        folder.write("p/unet/diffusion_pytorch_model.safetensors.index.json", "{\"weight_map\":" + map + "}");
    };
    index(R"({"a": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors"})");
    const Checkpoint file = Checkpoint::open(folder.path("p"));
    CHECK(file.has("unet.a"));
    CHECK(file.has("unet.c"));

    for (const char * outside :
         {"../vae/x.safetensors", "/etc/passwd", "..", ".", "", "a\\\\b", "C:x", "1.safetensors\\u0000"}) {
        CAPTURE(outside);
        index(std::string("{\"a\":\"") + outside + "\"}");
        CHECK(contains(open_complaint(folder.path("p")), "not in its own folder"));
    }
    index(R"({"a": "3.safetensors"})");
    CHECK(contains(open_complaint(folder.path("p")), "lists 1 files, but 3.safetensors is missing"));
    index("[]");
    CHECK(contains(open_complaint(folder.path("p")), "has no weight_map"));
    index(R"({"a": 1})");
    CHECK(contains(open_complaint(folder.path("p")), "is no file name"));
    folder.write("p/unet/2.safetensors", safetensors_of({"a"}));
    index(R"({"a": "1.safetensors", "b": "2.safetensors"})");
    CHECK(contains(open_complaint(folder.path("p")),
                   "which " + folder.path("p/unet/1.safetensors") + " holds as well"));
}

TEST_CASE("what a folder lacks is named") {
    Folder folder;
    folder.write("p/model_index.json", "{}");
    CHECK(contains(open_complaint(folder.path("p")), "neither unet nor transformer"));
    folder.write("p/unet/config.json", "{}");
    CHECK(
        contains(open_complaint(folder.path("p")), "unet: has neither diffusion_pytorch_model.safetensors"));
    folder.write("p/unet/diffusion_pytorch_model.bin", "x");
    CHECK(contains(open_complaint(folder.path("p"), Status::unsupported), "pickle"));
    folder.write("p/unet/diffusion_pytorch_model.safetensors", safetensors_of({"a"}));
    CHECK(open_complaint(folder.path("p")) == "");
    folder.write("p/unet/config.json", "{");
    CHECK(contains(open_complaint(folder.path("p")), "config.json: is no valid JSON"));
    folder.write("p/model_index.json", "[]");
    CHECK(contains(open_complaint(folder.path("p")), "is no JSON object"));
}

TEST_CASE("a component given apart replaces that one, in any of its spellings") {
    const std::string unet = "model.diffusion_model.out.0.weight", vae = "first_stage_model.decoder.x";
    const std::string clip = "cond_stage_model.transformer.text_model.x", rest = "alphas_cumprod";

    CHECK(names_with("vae", {"first_stage_model.encoder.a", "model_ema.b"}) ==
          Names{rest, clip, "first_stage_model.encoder.a", unet});
    CHECK(names_with("vae", {"encoder.down.0.a", "quant_conv.b", "decoder.c"}) ==
          Names{rest, clip, "first_stage_model.decoder.c", "first_stage_model.encoder.down.0.a",
                "first_stage_model.quant_conv.b", unet});
    CHECK(names_with("vae", {"vae.decoder.up.0.a"}) ==
          Names{rest, clip, "first_stage_model.decoder.up.0.a", unet});
    CHECK(names_with("vae", {"vae.decoder.up_blocks.0.a"}) ==
          Names{rest, clip, unet, "vae.decoder.up_blocks.0.a"});
    CHECK(names_with("vae", {"encoder.down_blocks.0.a", "encoder.mid_block.attentions.0.proj_attn.bias"}) ==
          Names{rest, clip, unet, "vae.encoder.down_blocks.0.a",
                "vae.encoder.mid_block.attentions.0.to_out.0.bias"});

    CHECK(names_with("model", {"model.diffusion_model.a", vae}) ==
          Names{rest, clip, vae, "model.diffusion_model.a"});
    CHECK(names_with("unet", {"diffusion_model.a"}) == Names{rest, clip, vae, "model.diffusion_model.a"});
    CHECK(names_with("unet", {"input_blocks.0.a", "time_embed.b"}) ==
          Names{rest, clip, vae, "model.diffusion_model.input_blocks.0.a",
                "model.diffusion_model.time_embed.b"});
    CHECK(names_with("unet", {"down_blocks.0.a", "conv_in.b"}) ==
          Names{rest, clip, vae, "unet.conv_in.b", "unet.down_blocks.0.a"});

    CHECK(names_with("clip_l", {"cond_stage_model.transformer.text_model.y"}) ==
          Names{rest, vae, unet, "text_encoder.text_model.y"});
    for (const char * name : {"encoder.block.3.layer.1.DenseReluDense.wi_0.weight", "enc.blk.3.ffn_gate.weight",
                              "text_encoder_2.encoder.block.3.layer.1.DenseReluDense.wi_0.weight",
                              "text_encoder_3.encoder.block.3.layer.1.DenseReluDense.wi_0.weight"}) {
        CAPTURE(name);
        CHECK(names_with("t5xxl", {name}) ==
              Names{rest, clip, vae, unet,
                    "text_encoders.t5xxl.transformer.encoder.block.3.layer.1.DenseReluDense.wi_0.weight"});
    }
    for (const char * name :
         {"text_model.embeddings.token_embedding.weight", "embeddings.token_embedding.weight",
          "text_encoder.text_model.embeddings.token_embedding.weight",
          "text_encoder.embeddings.token_embedding.weight",
          "text_encoders.clip_l.transformer.text_model.embeddings.token_embedding.weight"}) {
        CAPTURE(name);
        CHECK(names_with("clip_l", {name}) ==
              Names{rest, vae, unet, "text_encoder.text_model.embeddings.token_embedding.weight"});
    }
}

TEST_CASE("components over a diffusers folder take the place of its tensors and configs") {
    Folder folder;
    write_pipeline(folder);
    const std::string unet = folder.write("x.safetensors", safetensors_of({"input_blocks.0.a"}));
    const Checkpoint  file = Checkpoint::open(folder.path("p"), {{"model", unet}});
    CHECK(file.has("model.diffusion_model.input_blocks.0.a"));
    CHECK_FALSE(file.has("unet.conv_in.weight"));
    CHECK(file.metadata().count("unet.act_fn") == 0);
    CHECK(file.metadata().count("vae.scaling_factor") == 1);
    CHECK(file.metadata().at("prediction_type") == "v_prediction");
}

TEST_CASE("components may be folders, and may be all there is") {
    Folder folder;
    write_pipeline(folder);
    const Checkpoint file =
        Checkpoint::open("", {{"unet", folder.path("p/unet")}, {"clip_l", folder.path("p/text_encoder")}});
    CHECK(file.has("unet.down_blocks.0.x"));
    CHECK(file.has("text_encoder.text_model.final_layer_norm.weight"));
    CHECK(file.metadata().at("unet.attention_head_dim") == "5,10");
    CHECK(file.metadata().at("text_encoder.num_hidden_layers") == "12");
}

TEST_CASE("a component that is another one, or of an unknown role, is refused") {
    Folder            folder;
    const std::string path = folder.write("a.safetensors", safetensors_of({"input_blocks.0.weight"}));
    const auto        given = [&](const std::string & role) { Checkpoint::open(path, {{role, path}}); };
    CHECK(contains(complaint([&] { given("vae"); }, Status::bad_file),
                   "a.safetensors: holds no VAE that we know (its first tensor is input_blocks.0.weight)"));
    CHECK(contains(complaint([&] { given("clip_l"); }, Status::bad_file), "CLIP-L"));
    CHECK(contains(complaint([&] { given("t6"); }, Status::bad_argument),
                   "component 't6' is not known; there are: model, vae, clip_l, t5xxl, clip_g, clip_h"));
}

TEST_CASE("a bare component as the main file keeps its names") {
    Folder folder;
    CHECK(Checkpoint::open(folder.write("a", safetensors_of({"input_blocks.0.weight"})))
              .has("input_blocks.0.weight"));
}

TEST_CASE("a file that changes below us is noticed") {
    Folder            folder;
    const std::string bytes = safetensors_of({"a"});
    const std::string path = folder.write("a.safetensors", bytes);
    const Checkpoint  file = Checkpoint::open(path);
    file.verify_unchanged("open");
    std::this_thread::sleep_for(std::chrono::milliseconds(20)); // beyond the clock tick of file systems
    SUBCASE("written again") {
        folder.write("a.safetensors", bytes);
        CHECK(contains(complaint([&] { file.verify_unchanged("open"); }, Status::io), "was changed on disk"));
    }
    SUBCASE("cut") {
        std::filesystem::resize_file(path, bytes.size() - 1);
        CHECK(contains(complaint([&] { file.verify_unchanged("open"); }, Status::io), "was changed on disk"));
    }
    SUBCASE("deleted: what is mapped stays") {
        std::filesystem::remove(path);
        file.verify_unchanged("open");
        CHECK(bytes_of(*file.find("a")) == std::string(4, '\0'));
    }
}

TEST_CASE("a file in RAM may change or vanish") {
    Folder            folder;
    const std::string bytes = safetensors_of({"a"});
    const std::string path = folder.write("a.safetensors", bytes);
    const Checkpoint  file = Checkpoint::open(path, {}, true);
    std::this_thread::sleep_for(std::chrono::milliseconds(20)); // beyond the clock tick of file systems
    SUBCASE("written again") { folder.write("a.safetensors", std::string(bytes.size(), 'x')); }
    SUBCASE("cut") { std::filesystem::resize_file(path, 1); }
    SUBCASE("deleted") { std::filesystem::remove(path); }
    file.verify_unchanged("open");
    CHECK(bytes_of(*file.find("a")) == std::string(4, '\0'));
}
