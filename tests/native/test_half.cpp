#include "core/error.h"
#include "core/half.h"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <vector>

using namespace sd;

namespace {

// The value of a small float by its definition.
double by_definition(int code, int exponent_bits, int mantissa_bits, bool has_infinity) {
    const int    largest = (1 << exponent_bits) - 1;
    const int    bias = largest / 2;
    const int    exponent = code >> mantissa_bits & largest;
    const int    mantissa = code & ((1 << mantissa_bits) - 1);
    const double sign = code >> (exponent_bits + mantissa_bits) & 1 ? -1 : 1;
    if (has_infinity && exponent == largest) {
        return mantissa ? std::nan("") : sign * std::numeric_limits<double>::infinity();
    }
    if (!has_infinity && exponent == largest && mantissa == (1 << mantissa_bits) - 1) {
        return std::nan("");
    }
    return exponent ? sign * std::ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits)
                    : sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
}

bool same(double a, double b) {
    return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b);
}

// Every value goes there and back; what lies between two neighbours goes to the nearer, a tie to the even one.
template <typename Widen, typename Narrow> int rounding_faults(uint16_t last, Widen widen, Narrow narrow) {
    int faults = 0;
    for (uint16_t code = 0; code < last; ++code) {
        const uint16_t next = static_cast<uint16_t>(code + 1);
        const float    low = widen(code), high = widen(next);
        const float middle = static_cast<float>((static_cast<double>(low) + static_cast<double>(high)) / 2);
        faults += narrow(low) != code;
        faults += narrow(-low) != (code | 0x8000);
        faults += narrow(middle) != (code & 1 ? next : code);
        faults += narrow(std::nextafter(middle, 0.0f)) != code;
        faults += narrow(std::nextafter(middle, std::numeric_limits<float>::infinity())) != next;
    }
    return faults;
}

} // namespace

TEST_CASE("narrow floats widen exactly") {
    int faults = 0;
    for (int i = 0; i < 65536; ++i) {
        const uint16_t code = static_cast<uint16_t>(i);
        faults += !same(static_cast<double>(f16_to_f32(code)), by_definition(i, 5, 10, true));
        faults += !same(static_cast<double>(bf16_to_f32(code)), by_definition(i, 8, 7, true));
    }
    for (int i = 0; i < 256; ++i) {
        const uint8_t code = static_cast<uint8_t>(i);
        faults += !same(static_cast<double>(f8_e4m3_to_f32(code)), by_definition(i, 4, 3, false));
        faults += !same(static_cast<double>(f8_e5m2_to_f32(code)), by_definition(i, 5, 2, true));
    }
    CHECK(faults == 0);
}

TEST_CASE("floats narrow to the nearest, ties to even") {
    CHECK(rounding_faults(0x7bff, f16_to_f32, f32_to_f16) == 0);
    CHECK(rounding_faults(0x7f7f, bf16_to_f32, f32_to_bf16) == 0);
    const float infinity = std::numeric_limits<float>::infinity();
    CHECK(f32_to_f16(65519.996f) == 0x7bff);
    CHECK(f32_to_f16(65520.0f) == 0x7c00);
    CHECK(f32_to_f16(-infinity) == 0xfc00);
    CHECK(f32_to_f16(1e-30f) == 0);
    CHECK(f32_to_bf16(std::numeric_limits<float>::max()) == 0x7f80);
    CHECK(f32_to_bf16(-infinity) == 0xff80);
    for (const uint32_t nan : {0x7f800001u, 0x7fc00000u, 0xffffffffu}) {
        CHECK(std::isnan(f16_to_f32(f32_to_f16(float_of_bits(nan)))));
        CHECK(std::isnan(bf16_to_f32(f32_to_bf16(float_of_bits(nan)))));
    }
}

TEST_CASE("runs of values of every plain type widen, wherever they lie") {
    const auto widened = [](DType type, const std::vector<uint8_t> & bytes, size_t n) {
        std::vector<uint8_t> shifted(bytes.size() + 1);
        std::memcpy(shifted.data() + 1, bytes.data(), bytes.size());
        std::vector<float> out(n);
        to_f32(type, shifted.data() + 1, out.data(), n);
        return out;
    };
    using Floats = std::vector<float>;
    CHECK(widened(DType::f32, {0, 0, 0x80, 0x3f, 0, 0, 0, 0xc0}, 2) == Floats{1, -2});
    CHECK(widened(DType::f16, {0, 0x3c, 0, 0xc0}, 2) == Floats{1, -2});
    CHECK(widened(DType::bf16, {0x80, 0x3f, 0, 0xc0}, 2) == Floats{1, -2});
    CHECK(widened(DType::f64, {0, 0, 0, 0, 0, 0, 0xf0, 0x3f}, 1) == Floats{1});
    CHECK(widened(DType::f8_e4m3, {0x38, 0xc0}, 2) == Floats{1, -2});
    CHECK(widened(DType::f8_e5m2, {0x3c, 0xc0}, 2) == Floats{1, -2});
    CHECK(widened(DType::boolean, {0, 1, 7}, 3) == Floats{0, 1, 1});
    CHECK(widened(DType::i8, {0x80, 1}, 2) == Floats{-128, 1});
    CHECK(widened(DType::u8, {0x80, 1}, 2) == Floats{128, 1});
    CHECK(widened(DType::i16, {0, 0x80}, 1) == Floats{-32768});
    CHECK(widened(DType::u16, {0, 0x80}, 1) == Floats{32768});
    CHECK(widened(DType::i32, {0xff, 0xff, 0xff, 0xff}, 1) == Floats{-1});
    CHECK(widened(DType::u32, {0, 0, 0, 0x80}, 1) == Floats{2147483648.0f});
    CHECK(widened(DType::i64, {0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, 1) == Floats{-2});
    CHECK(widened(DType::u64, {0, 0, 0, 0, 0, 0, 0, 0x80}, 1) == Floats{9223372036854775808.0f});
    CHECK_THROWS_AS(widened(DType::q8_0, {0}, 1), Error);
}

TEST_CASE("runs of floats narrow") {
    const std::vector<float> from = {1, -2, 0.1f};
    std::vector<uint16_t>    to(3);
    from_f32(DType::f16, from.data(), to.data(), 3);
    CHECK(to == std::vector<uint16_t>{0x3c00, 0xc000, 0x2e66});
    from_f32(DType::bf16, from.data(), to.data(), 3);
    CHECK(to == std::vector<uint16_t>{0x3f80, 0xc000, 0x3dcd});
    std::vector<float> same_type(3);
    from_f32(DType::f32, from.data(), same_type.data(), 3);
    CHECK(same_type == from);
    CHECK_THROWS_AS(from_f32(DType::i32, from.data(), to.data(), 1), Error);
}
