// Names and block sizes after ggml's type table (ggml.h and ggml-common.h); tests/native/test_half.cpp and
// nn/weights.cpp compare them with the ggml that is linked.
#include "core/dtype.h"

#include <cctype>
#include <iterator>

namespace sd {
namespace {

constexpr DTypeInfo TYPES[] = {
    {DType::f32, "f32", 1, 4},
    {DType::f16, "f16", 1, 2},
    {DType::q4_0, "q4_0", 32, 18},
    {DType::q4_1, "q4_1", 32, 20},
    {DType::q5_0, "q5_0", 32, 22},
    {DType::q5_1, "q5_1", 32, 24},
    {DType::q8_0, "q8_0", 32, 34},
    {DType::q8_1, "q8_1", 32, 36},
    {DType::q2_k, "q2_K", 256, 84},
    {DType::q3_k, "q3_K", 256, 110},
    {DType::q4_k, "q4_K", 256, 144},
    {DType::q5_k, "q5_K", 256, 176},
    {DType::q6_k, "q6_K", 256, 210},
    {DType::q8_k, "q8_K", 256, 292},
    {DType::iq2_xxs, "iq2_xxs", 256, 66},
    {DType::iq2_xs, "iq2_xs", 256, 74},
    {DType::iq3_xxs, "iq3_xxs", 256, 98},
    {DType::iq1_s, "iq1_s", 256, 50},
    {DType::iq4_nl, "iq4_nl", 32, 18},
    {DType::iq3_s, "iq3_s", 256, 110},
    {DType::iq2_s, "iq2_s", 256, 82},
    {DType::iq4_xs, "iq4_xs", 256, 136},
    {DType::i8, "i8", 1, 1},
    {DType::i16, "i16", 1, 2},
    {DType::i32, "i32", 1, 4},
    {DType::i64, "i64", 1, 8},
    {DType::f64, "f64", 1, 8},
    {DType::iq1_m, "iq1_m", 256, 56},
    {DType::bf16, "bf16", 1, 2},
    {DType::tq1_0, "tq1_0", 256, 54},
    {DType::tq2_0, "tq2_0", 256, 66},
    {DType::mxfp4, "mxfp4", 32, 17},
    {DType::nvfp4, "nvfp4", 64, 36},
    {DType::q1_0, "q1_0", 128, 18},
    {DType::q2_0, "q2_0", 64, 18},
    {DType::f8_e4m3, "f8_e4m3", 1, 1},
    {DType::f8_e5m2, "f8_e5m2", 1, 1},
    {DType::boolean, "bool", 1, 1},
    {DType::u8, "u8", 1, 1},
    {DType::u16, "u16", 1, 2},
    {DType::u32, "u32", 1, 4},
    {DType::u64, "u64", 1, 8},
};

// Users write "Q4_K" as often as "q4_K".
bool same_word(const char * a, const char * b) {
    for (; *a && *b; ++a, ++b) {
        if (std::tolower(static_cast<unsigned char>(*a)) != std::tolower(static_cast<unsigned char>(*b))) {
            return false;
        }
    }
    return *a == *b;
}

} // namespace

const DTypeInfo * dtype_info(int32_t type) {
    for (const DTypeInfo & info : TYPES) {
        if (static_cast<int32_t>(info.type) == type) {
            return &info;
        }
    }
    return nullptr;
}

const DTypeInfo * dtype_by_name(const char * name) {
    for (const DTypeInfo & info : TYPES) {
        if (same_word(info.name, name)) {
            return &info;
        }
    }
    return nullptr;
}

const DTypeInfo * dtype_at(int index) {
    return index >= 0 && static_cast<size_t>(index) < std::size(TYPES) ? &TYPES[index] : nullptr;
}

const char * dtype_name(DType type) {
    const DTypeInfo * info = dtype_info(static_cast<int32_t>(type));
    return info ? info->name : "?";
}

} // namespace sd
