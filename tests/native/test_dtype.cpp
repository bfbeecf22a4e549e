#include "core/dtype.h"

#include <doctest/doctest.h>
#include <ggml.h>

#include <string>

using namespace sd;

TEST_CASE("types have ggml's numbers, names and sizes") {
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        const DTypeInfo * ours = dtype_info(i);
        const ggml_type   theirs = static_cast<ggml_type>(i);
        CAPTURE(i);
        REQUIRE((ours != nullptr) == (ggml_blck_size(theirs) > 0));
        if (ours) {
            CHECK(std::string(ours->name) == ggml_type_name(theirs));
            CHECK(ours->block == ggml_blck_size(theirs));
            CHECK(ours->block_bytes == ggml_type_size(theirs));
            CHECK(is_quantised(ours->type) == ggml_is_quantized(theirs));
        }
    }
}

TEST_CASE("types are found by name in any case") {
    CHECK(dtype_by_name("q4_K")->type == DType::q4_k);
    CHECK(dtype_by_name("Q4_K")->type == DType::q4_k);
    CHECK(dtype_by_name("f8_e4m3")->type == DType::f8_e4m3);
    CHECK(dtype_by_name("q4") == nullptr);
    CHECK(dtype_by_name("q4_K_") == nullptr);
    CHECK(dtype_by_name("") == nullptr);
    CHECK(dtype_info(4) == nullptr);
    CHECK(dtype_info(-1) == nullptr);
    CHECK(std::string(dtype_name(DType::boolean)) == "bool");
}
