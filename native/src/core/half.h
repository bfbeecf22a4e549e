// Narrow floats: IEEE half, bfloat16 and the two 8-bit floats of the OCP "OFP8" paper (E4M3 without
// infinities, as torch's float8_e4m3fn). Widening is exact; narrowing rounds to nearest, ties to even.
#pragma once

#include "core/dtype.h"

#include <cstring>

namespace sd {

inline float float_of_bits(uint32_t bits) {
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

inline uint32_t bits_of_float(float value) {
    uint32_t out;
    std::memcpy(&out, &value, sizeof out);
    return out;
}

// Where ?: would have one side computed only when it is needed, and the loop around it not vectorised.
inline uint32_t select(bool condition, uint32_t yes, uint32_t no) {
    const uint32_t mask = 0u - static_cast<uint32_t>(condition);
    return (yes & mask) | (no & ~mask);
}

// Free of branches, and of float subnormals, which a host may have set to flush to zero.
inline float f16_to_f32(uint16_t half) {
    const uint32_t sign = (half & 0x8000u) << 16;
    const uint32_t rest = half & 0x7fffu;
    const uint32_t tiny = bits_of_float(static_cast<float>(static_cast<int32_t>(rest)) * 0x1p-24f); // subnormal: rest · 2⁻²⁴
    const uint32_t wide = (rest << 13) + select(rest < 0x7c00, 112u << 23, 224u << 23);
    return float_of_bits(sign | select(rest < 0x0400, tiny, wide));
}

inline uint16_t f32_to_f16(float value) {
    const uint32_t bits = bits_of_float(value);
    const uint32_t rest = bits & 0x7fffffffu;
    // Below 2⁻¹⁴ a half counts in 2⁻²⁴, as a float does between 0.5 and 1: the addition rounds.
    const uint32_t tiny = bits_of_float(float_of_bits(rest) + 0.5f) - 0x3f000000u;
    const uint32_t even = (rest + 0xfffu + ((rest >> 13) & 1u) - (112u << 23)) >> 13;
    const uint32_t nan = 0x7e00u | ((rest >> 13) & 0x3ffu);
    const uint32_t beyond = select(rest > 0x7f800000u, nan, 0x7c00u); // `even` makes infinity from 65520
    const uint32_t finite = select(rest < 0x38800000u, tiny, even);
    return static_cast<uint16_t>((bits >> 16 & 0x8000u) | select(rest >= 0x47800000u, beyond, finite));
}

inline float bf16_to_f32(uint16_t value) { return float_of_bits(static_cast<uint32_t>(value) << 16); }

inline uint16_t f32_to_bf16(float value) {
    const uint32_t bits = bits_of_float(value);
    const uint32_t even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? bits >> 16 | 0x40u : even);
}

float f8_e4m3_to_f32(uint8_t value);

// Beyond the largest: NaN, and infinity.
uint8_t f32_to_f8_e4m3(float value);
uint8_t f32_to_f8_e5m2(float value);

// A half without its lower byte.
inline float f8_e5m2_to_f32(uint8_t value) { return f16_to_f32(static_cast<uint16_t>(value << 8)); }

// `n` values of any type that is not quantised; `from` may be unaligned. Beyond 24 bits integers round.
void to_f32(DType type, const void * from, float * to, size_t n);

// To f32, f16, bf16 or an 8-bit float; `to` may be unaligned.
void from_f32(DType type, const float * from, void * to, size_t n);

} // namespace sd
