#include "core/half.h"

#include "core/error.h"
#include "core/vectors.h"

#include <array>

namespace sd {
namespace {

// S.EEEE.MMM, bias 7; all ones is the only NaN, there is no infinity.
constexpr uint32_t e4m3_bits(uint32_t value) {
    const uint32_t sign = (value & 0x80u) << 24;
    const uint32_t exponent = value >> 3 & 0xfu;
    uint32_t       mantissa = value & 7u;
    if (exponent == 15 && mantissa == 7) {
        return sign | 0x7fc00000u;
    }
    if (exponent > 0) {
        return sign | (exponent + 120) << 23 | mantissa << 20;
    }
    if (mantissa == 0) {
        return sign;
    }
    uint32_t shifted = 0;
    for (; mantissa < 8; mantissa <<= 1) { // subnormal: find its leading one
        ++shifted;
    }
    return sign | (121 - shifted) << 23 | (mantissa & 7u) << 20;
}

constexpr std::array<uint32_t, 256> make_e4m3() {
    std::array<uint32_t, 256> table{};
    for (uint32_t i = 0; i < 256; ++i) {
        table[i] = e4m3_bits(i);
    }
    return table;
}

constexpr std::array<uint32_t, 256> E4M3 = make_e4m3();

// The 8-bit float nearest to a float, ties to the even one; `beyond` is the code of what is larger than the largest.
uint8_t narrow_f8(float value, uint32_t mantissa_bits, uint32_t bias, uint8_t largest, uint8_t beyond) {
    const uint32_t bits = bits_of_float(value);
    const uint32_t rest = bits & 0x7fffffffu;
    const uint8_t  sign = static_cast<uint8_t>(bits >> 24 & 0x80u);
    if (rest > 0x7f800000u) {
        return sign | 0x7fu;
    }
    uint32_t code;
    if (rest < (128 - bias) << 23) { // subnormal: as a float does between 2^23 and 2^24, it counts in one unit
        const float unit = float_of_bits((151 - bias - mantissa_bits) << 23); // 2^23 times the least number
        code = bits_of_float(float_of_bits(rest) + unit) - bits_of_float(unit);
    } else {
        const uint32_t cut = 23 - mantissa_bits;
        code = ((rest + (1u << (cut - 1)) - 1 + (rest >> cut & 1u)) >> cut) - ((127 - bias) << mantissa_bits);
    }
    return sign | (code > largest ? beyond : static_cast<uint8_t>(code));
}

// One loop per type, so that the compiler vectorises it.
template <typename From, typename To, typename Convert>
[[gnu::always_inline]] inline void each(const void * from, void * to, size_t n, Convert convert) {
    const uint8_t * source = static_cast<const uint8_t *>(from);
    uint8_t *       target = static_cast<uint8_t *>(to);
    for (size_t i = 0; i < n; ++i) {
        From value;
        std::memcpy(&value, source + i * sizeof(From), sizeof(From));
        const To converted = convert(value);
        std::memcpy(target + i * sizeof(To), &converted, sizeof(To));
    }
}

// A lambda has a type of its own, so each loop is compiled with its conversion inside.
constexpr auto WIDEN_F16 = [](uint16_t value) { return f16_to_f32(value); };
constexpr auto WIDEN_BF16 = [](uint16_t value) { return bf16_to_f32(value); };
constexpr auto WIDEN_E5M2 = [](uint8_t value) { return f8_e5m2_to_f32(value); };
constexpr auto WIDEN_E4M3 = [](uint8_t value) { return f8_e4m3_to_f32(value); };
constexpr auto WIDEN_BOOL = [](uint8_t value) { return value ? 1.0f : 0.0f; };
constexpr auto NARROW_F16 = [](float value) { return f32_to_f16(value); };
constexpr auto NARROW_BF16 = [](float value) { return f32_to_bf16(value); };
constexpr auto NARROW_E4M3 = [](float value) { return f32_to_f8_e4m3(value); };
constexpr auto NARROW_E5M2 = [](float value) { return f32_to_f8_e5m2(value); };

template <typename From> [[gnu::always_inline]] inline void widen(const void * from, float * to, size_t n) {
    each<From, float>(from, to, n, [](From value) { return static_cast<float>(value); });
}

} // namespace

float f8_e4m3_to_f32(uint8_t value) { return float_of_bits(E4M3[value]); }

uint8_t f32_to_f8_e4m3(float value) { return narrow_f8(value, 3, 7, 0x7e, 0x7f); }
uint8_t f32_to_f8_e5m2(float value) { return narrow_f8(value, 2, 15, 0x7b, 0x7c); }

SD_WIDE_VECTORS void to_f32(DType type, const void * from, float * to, size_t n) {
    switch (type) {
    case DType::f32: std::memcpy(to, from, n * sizeof(float)); return;
    case DType::f16: each<uint16_t, float>(from, to, n, WIDEN_F16); return;
    case DType::bf16: each<uint16_t, float>(from, to, n, WIDEN_BF16); return;
    case DType::f64: widen<double>(from, to, n); return;
    case DType::f8_e4m3: each<uint8_t, float>(from, to, n, WIDEN_E4M3); return;
    case DType::f8_e5m2: each<uint8_t, float>(from, to, n, WIDEN_E5M2); return;
    case DType::boolean: each<uint8_t, float>(from, to, n, WIDEN_BOOL); return;
    case DType::i8: widen<int8_t>(from, to, n); return;
    case DType::i16: widen<int16_t>(from, to, n); return;
    case DType::i32: widen<int32_t>(from, to, n); return;
    case DType::i64: widen<int64_t>(from, to, n); return;
    case DType::u8: widen<uint8_t>(from, to, n); return;
    case DType::u16: widen<uint16_t>(from, to, n); return;
    case DType::u32: widen<uint32_t>(from, to, n); return;
    case DType::u64: widen<uint64_t>(from, to, n); return;
    default: fail(Status::internal, "values of type %s cannot be widened one by one", dtype_name(type));
    }
}

SD_WIDE_VECTORS void from_f32(DType type, const float * from, void * to, size_t n) {
    switch (type) {
    case DType::f32: std::memcpy(to, from, n * sizeof(float)); return;
    case DType::f16: each<float, uint16_t>(from, to, n, NARROW_F16); return;
    case DType::bf16: each<float, uint16_t>(from, to, n, NARROW_BF16); return;
    case DType::f8_e4m3: each<float, uint8_t>(from, to, n, NARROW_E4M3); return;
    case DType::f8_e5m2: each<float, uint8_t>(from, to, n, NARROW_E5M2); return;
    default: fail(Status::internal, "floats cannot be narrowed to %s one by one", dtype_name(type));
    }
}

} // namespace sd
