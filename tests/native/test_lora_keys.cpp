#include "files.h"

#include "lora/lora_config.h"
#include "lora/lora_keys.h"

using namespace sd;
using namespace sd::test;

namespace {

void check_key(const std::string & key, const std::string & stem, LoraRole role,
               const std::string & spelling = "") {
    CAPTURE(key);
    const std::optional<LoraKey> found = parse_lora_key(key);
    REQUIRE(found);
    CHECK(found->stem == stem);
    CHECK(static_cast<int>(found->role) == static_cast<int>(role));
    if (!spelling.empty()) {
        CHECK(found->spelling == spelling);
    }
}

} // namespace

TEST_CASE("every suffix of the catalogue has its role") {
    const std::pair<const char *, LoraRole> ROLES[] = {
        {".lora_down.weight", LoraRole::down},
        {".lora_up.weight", LoraRole::up},
        {".lora_mid.weight", LoraRole::mid},
        {".alpha", LoraRole::alpha},
        {".lora_A.weight", LoraRole::down},
        {".lora_B.weight", LoraRole::up},
        {".lora_A.default.weight", LoraRole::down},
        {".lora_B.other_name.weight", LoraRole::up},
        {".lora_A", LoraRole::down},
        {".lora_B", LoraRole::up},
        {".lora_B.bias", LoraRole::up_bias},
        {".lora_B.default.bias", LoraRole::up_bias},
        {".lora.down.weight", LoraRole::down},
        {".lora.up.weight", LoraRole::up},
        {"_lora.down.weight", LoraRole::down},
        {"_lora.up.weight", LoraRole::up},
        {".lora_linear_layer.down.weight", LoraRole::down},
        {".lora_linear_layer.up.weight", LoraRole::up},
        {".lora_embedding_A", LoraRole::embedding_down},
        {".lora_embedding_B", LoraRole::embedding_up},
        {".lora_embedding_B.default", LoraRole::embedding_up},
        {".lora_a", LoraRole::down},
        {".weight.lora_b", LoraRole::up},
        {".hada_w1_a", LoraRole::hada_w1_a},
        {".hada_w1_b", LoraRole::hada_w1_b},
        {".hada_w2_a", LoraRole::hada_w2_a},
        {".hada_w2_b", LoraRole::hada_w2_b},
        {".hada_t1", LoraRole::hada_t1},
        {".hada_t2", LoraRole::hada_t2},
        {".lokr_w1", LoraRole::lokr_w1},
        {".lokr_w2", LoraRole::lokr_w2},
        {".lokr_w1_a", LoraRole::lokr_w1_a},
        {".lokr_w1_b", LoraRole::lokr_w1_b},
        {".lokr_w2_a", LoraRole::lokr_w2_a},
        {".lokr_w2_b", LoraRole::lokr_w2_b},
        {".lokr_t2", LoraRole::lokr_t2},
        {".diff", LoraRole::diff},
        {".diff_b", LoraRole::diff_bias},
        {".w_norm", LoraRole::diff},
        {".b_norm", LoraRole::diff_bias},
        {".set_weight", LoraRole::set_weight},
        {".reshape_weight", LoraRole::known},
        {".weight", LoraRole::weight},
        {".bias", LoraRole::bias},
        {".on_input", LoraRole::on_input},
        {".ia3_l", LoraRole::ia3_factor},
        {".a1.weight", LoraRole::a1},
        {".a2.weight", LoraRole::a2},
        {".b1.weight", LoraRole::b1},
        {".b2.weight", LoraRole::b2},
        {".bm.weight", LoraRole::bm},
        {".oft_blocks", LoraRole::oft_blocks},
        {".oft_R.weight", LoraRole::oft_rotation},
        {".oft_diag", LoraRole::unreadable},
        {".rescale", LoraRole::rescale},
        {".dora_scale", LoraRole::magnitude},
        {".magnitude", LoraRole::magnitude_of_rows},
        {".lora_magnitude_vector", LoraRole::magnitude_of_rows},
        {".lora_magnitude_vector.weight", LoraRole::magnitude_of_rows},
        {".lora_magnitude_vector.default.weight", LoraRole::magnitude_of_rows},
        {".lora_magnitude_vector.default", LoraRole::magnitude_of_rows},
        {".scale", LoraRole::scale},
        {".scalar", LoraRole::scalar},
    };
    for (const auto & [suffix, role] : ROLES) {
        check_key(std::string("a.to_q") + suffix, "a.to_q", role);
    }
}

TEST_CASE("halves of a pair share their spelling, and an adapter's name is part of it") {
    check_key("x.lora_A.default.weight", "x", LoraRole::down, "lora_A.default");
    check_key("x.lora_B.default.weight", "x", LoraRole::up, "lora_A.default");
    check_key("x.lora_A.two", "x", LoraRole::down, "lora_A.two");
    check_key("x.lora_A.weight", "x", LoraRole::down, "lora_A");
}

TEST_CASE("a suffix counts at the end only, and short ones with the right stem only") {
    check_key("lora_up.alpha_to.lora_down.weight", "lora_up.alpha_to", LoraRole::down); // T45
    check_key("double_blocks.0.processor.qkv_lora1.down.weight", "double_blocks.0.processor.qkv_lora1",
              LoraRole::down, "xlabs");
    check_key("single_blocks.0.processor.proj_lora.up.weight", "single_blocks.0.processor.proj", LoraRole::up,
              "processor");
    check_key("encoder.down.weight", "encoder.down", LoraRole::weight);
    check_key("x.oft_blocks.3", "x", LoraRole::oft_blocks);
    CHECK(parse_lora_key("x.oft_blocks.3")->part == 3);
    for (const char * none : {"", ".", "x", "x.oft_blocks.", "oft_blocks.1", "x.foo", "unet:0:up"}) {
        CAPTURE(none);
        CHECK_FALSE(parse_lora_key(none).has_value());
    }
}

TEST_CASE("what trainers leave behind is known and means nothing") {
    check_key("bundle_emb.token.clip_l", "bundle_emb.token.clip_l", LoraRole::bundled);
    check_key("x._aux.y", "x._aux.y", LoraRole::known);
    check_key("text_model.embeddings.position_ids", "text_model.embeddings", LoraRole::known);
    check_key("loss", "loss", LoraRole::known);
}

TEST_CASE("patterns match a whole path, or what is behind a dot") {
    CHECK(pattern_matches("attn.to_q", "attn.to_q"));
    CHECK(pattern_matches("attn.to_q", "down.0.attn.to_q"));
    CHECK(pattern_matches("to_q", "down.0.attn.to_q"));
    CHECK_FALSE(pattern_matches("to_q", "down.0.attn.xto_q"));
    CHECK_FALSE(pattern_matches("attn", "down.0.attn.to_q"));
    CHECK(pattern_matches("down.*to_.", "down.0.attn.to_q"));
    CHECK(pattern_matches(R"(^down\.\d+\.attn\.to_q$)", "down.10.attn.to_q"));
    CHECK_FALSE(pattern_matches(R"(^attn\.to_q)", "down.0.attn.to_q"));
    CHECK(pattern_matches(R"(\w+)", "a.to_q"));
    CHECK(pattern_matches("tok?_?q", "a.to_q"));
    CHECK_FALSE(pattern_matches("", "a"));
    CHECK_FALSE(
        pattern_matches(std::string(2000, '*') + std::string(2000, '.') + "*x", std::string(2000, 'a')));
    std::string stars;
    for (int i = 0; i < 200; ++i) {
        stars += ".*";
    }
    CHECK_FALSE(pattern_matches(stars + "x", std::string(500, 'a')));
}
