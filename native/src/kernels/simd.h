// Vectors of floats, as wide as the instruction set that this file is compiled for. Only the files of
// kernel sets include it: everything here has internal linkage, and nothing of the standard library that could
// leave a function behind is used, since the linker keeps one copy of such a function, of any instruction set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__) || defined(__F16C__)
#include <immintrin.h>
#endif

namespace sd {
namespace { // NOLINT: one copy per instruction set is what is wanted

#if defined(__AVX512F__)
constexpr int lanes = 16;
#elif defined(__AVX2__)
constexpr int lanes = 8;
#else
constexpr int lanes = 4;
#endif

#define SD_INLINE static inline __attribute__((always_inline))

typedef float    Vec __attribute__((vector_size(4 * lanes)));
typedef int32_t  IVec __attribute__((vector_size(4 * lanes)));
typedef uint32_t UVec __attribute__((vector_size(4 * lanes)));

SD_INLINE Vec load(const float * from) {
    Vec v;
    std::memcpy(&v, from, sizeof v);
    return v;
}
SD_INLINE void store(float * to, Vec v) { std::memcpy(to, &v, sizeof v); }
SD_INLINE Vec  splat(float value) { return value - Vec{}; }
SD_INLINE IVec bits(Vec v) { return (IVec) v; }
SD_INLINE Vec  floats(IVec v) { return (Vec) v; }
SD_INLINE Vec  larger(Vec a, Vec b) { return a > b ? a : b; }
SD_INLINE Vec  smaller(Vec a, Vec b) { return a < b ? a : b; }

// The first n floats, zeros behind them.
SD_INLINE Vec load_some(const float * from, int n) {
    alignas(64) float whole[lanes] = {};
    std::memcpy(whole, from, sizeof(float) * static_cast<size_t>(n));
    return load(whole);
}
SD_INLINE void store_some(float * to, Vec v, int n) {
    alignas(64) float whole[lanes];
    store(whole, v);
    std::memcpy(to, whole, sizeof(float) * static_cast<size_t>(n));
}

// Each lane and the one whose number differs in the bit `n`.
template <int n> SD_INLINE Vec swapped(Vec v) {
#if defined(__clang__)
    Vec out;
    for (int i = 0; i < lanes; ++i) {
        out[i] = v[i ^ n];
    }
    return out;
#else
    IVec order;
    for (int i = 0; i < lanes; ++i) {
        order[i] = i ^ n;
    }
    return __builtin_shuffle(v, order);
#endif
}

// In every lane.
template <int n = lanes / 2> SD_INLINE Vec sum_of(Vec v) {
    if constexpr (n > 0) {
        return sum_of<n / 2>(v + swapped<n>(v));
    }
    return v;
}
template <int n = lanes / 2> SD_INLINE Vec largest_of(Vec v) {
    if constexpr (n > 0) {
        return largest_of<n / 2>(larger(v, swapped<n>(v)));
    }
    return v;
}

// ---- elementary functions -------------------------------------------------------------------------------

// e^x: with x = n ln 2 + r, Taylor's polynomial of degree 6 in r, times 2^n. At |r| <= ln 2 / 2 its error is 1.2e-7, a
// unit of the last place. Below e^-87 the result is that of -87.
SD_INLINE Vec exp_of(Vec x) {
    x = larger(smaller(x, splat(88.0f)), splat(-87.0f));
    const Vec  magic = splat(12582912.0f); // 1.5 * 2^23: adding it rounds to a whole number
    const Vec  shifted = x * 1.44269504f + magic;
    const Vec  n = shifted - magic;
    const Vec  r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Vec        p = splat(1.0f / 720);
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return floats(bits(p) + ((bits(shifted) - bits(magic)) << 23));
}

// 2^x for x <= 0: with x = n + r, |r| <= 1/2, 2^n times the polynomial of least relative error in r (Remez): 1e-7 for
// floats, 7.5e-5, a fiftieth of what the rounding to bf16 adds, for what is `rough`.
template <bool rough> SD_INLINE Vec exp2_of(Vec x) {
#if defined(__AVX512F__)
    const Vec n = (Vec) _mm512_roundscale_ps((__m512) x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    x = larger(x, splat(-126.0f));
    const Vec magic = splat(12582912.0f); // 1.5 * 2^23: adding it rounds to a whole number
    const Vec shifted = x + magic;
    const Vec n = shifted - magic;
#endif
    const Vec r = x - n;
    Vec       p;
    if constexpr (rough) {
        p = r * 0.0551716685f + 0.242611125f;
        p = p * r + 0.693260968f;
        p = p * r + 0.999928057f;
    } else {
        p = r * 1.53458124e-4f + 1.33999309e-3f;
        p = p * r + 9.61848907e-3f;
        p = p * r + 0.0555032864f;
        p = p * r + 0.240226462f;
        p = p * r + 0.693147182f;
        p = p * r + 1.0f;
    }
#if defined(__AVX512F__)
    return (Vec) _mm512_scalef_ps((__m512) p, (__m512) n);
#else
    return floats(bits(p) + ((bits(shifted) - bits(magic)) << 23));
#endif
}

SD_INLINE Vec sigmoid_of(Vec x) { return 1.0f / (1.0f + exp_of(-x)); }
SD_INLINE Vec silu_of(Vec x) { return x * sigmoid_of(x); }
SD_INLINE Vec quick_gelu_of(Vec x) { return x * sigmoid_of(1.702f * x); }

// x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), Hendrycks and Gimpel 2016; (1 + tanh a) / 2 is sigmoid(2 a).
SD_INLINE Vec gelu_tanh_of(Vec x) { return x * sigmoid_of(1.5957691216f * (x + 0.044715f * x * x * x)); }

// x / 2 (1 + erf(x / sqrt 2)) with erf by Abramowitz and Stegun 7.1.26, whose error is below 1.5e-7.
SD_INLINE Vec gelu_of(Vec x) {
    const Vec z = x * 0.70710678f;
    const Vec a = z < 0.0f ? -z : z;
    const Vec t = 1.0f / (1.0f + 0.3275911f * a);
    Vec       p = splat(1.061405429f);
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const Vec tail = p * t * exp_of(-a * a); // 1 - erf(a)
    return x * 0.5f * (z < 0.0f ? tail : 2.0f - tail);
}

// ---- half-precision weights ------------------------------------------------------------------------------

SD_INLINE Vec load_f16(const uint16_t * from) {
#if defined(__AVX512F__)
    return (Vec) _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
#elif defined(__AVX2__) && defined(__F16C__)
    return (Vec) _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
#else
    Vec v;
    for (int i = 0; i < lanes; ++i) { // exponents move from 5 to 8 bits by a product, which takes subnormals along
        const uint32_t half = from[i];
        const uint32_t moved = (half & 0x7fff) << 13;
        float          value;
        std::memcpy(&value, &moved, sizeof value);
        value *= 5.192296858534828e33f; // 2^112
        uint32_t raw;
        std::memcpy(&raw, &value, sizeof raw);
        raw |= (half & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u; // infinities and NaN
        raw |= (half & 0x8000) << 16;
        std::memcpy(&value, &raw, sizeof value);
        v[i] = value;
    }
    return v;
#endif
}

SD_INLINE Vec load_bf16(const uint16_t * from) {
    typedef uint16_t Half __attribute__((vector_size(2 * lanes)));
    Half             half;
    std::memcpy(&half, from, sizeof half);
    return (Vec) (__builtin_convertvector(half, UVec) << 16);
}

// ---- transposing -----------------------------------------------------------------------------------------

template <int first> SD_INLINE Vec zip(Vec a, Vec b) {
#if defined(__clang__)
    Vec out;
    for (int i = 0; i < lanes / 2; ++i) {
        out[2 * i] = a[first + i];
        out[2 * i + 1] = b[first + i];
    }
    return out;
#else
    IVec order;
    for (int i = 0; i < lanes / 2; ++i) {
        order[2 * i] = first + i;
        order[2 * i + 1] = lanes + first + i;
    }
    return __builtin_shuffle(a, b, order);
#endif
}

// Rows become columns: zipping the first half of the rows with the second, once per power of two.
SD_INLINE void transpose(Vec (&rows)[lanes]) {
#pragma GCC unroll 4
    for (int n = 1; n < lanes; n *= 2) {
        Vec zipped[lanes];
#pragma GCC unroll 16
        for (int i = 0; i < lanes / 2; ++i) {
            zipped[2 * i] = zip<0>(rows[i], rows[i + lanes / 2]);
            zipped[2 * i + 1] = zip<lanes / 2>(rows[i], rows[i + lanes / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) {
            rows[i] = zipped[i];
        }
    }
}

} // namespace
} // namespace sd
