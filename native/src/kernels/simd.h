// Vectors of floats, as wide as the instruction set that this file is compiled for. Only the files of
// kernel sets include it: everything here has internal linkage, and nothing of the standard library that could
// leave a function behind is used, since the linker keeps one copy of such a function, of any instruction set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

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
// In sets whose products round to bf16 (2^-9) they are rough: 1e-4.

// 1 / x of x from 1 to 2^126.
SD_INLINE Vec inverse_of(Vec x) {
#if defined(__AVX512F__)
    const Vec guess = (Vec) _mm512_rcp14_ps((__m512) x); // to 2^-14, which one of Newton's steps doubles
#if defined(SD_BF16)
    return guess;
#else
    return guess * (2.0f - x * guess);
#endif
#else
    return 1.0f / x;
#endif
}

// 2^x for x <= 126, and 0 or 2^-126 where that is less: with x = n + r, |r| <= 1/2, 2^n times the polynomial of least
// relative error in r (Remez): 1e-7, and 7.5e-5 where rough.
SD_INLINE Vec exp2_of(Vec x) {
#if defined(__AVX512F__)
    const Vec n = (Vec) _mm512_roundscale_ps((__m512) x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    x = larger(x, splat(-126.0f));
    const Vec magic = splat(12582912.0f); // 1.5 * 2^23: adding it rounds to a whole number
    const Vec shifted = x + magic;
    const Vec n = shifted - magic;
#endif
    const Vec r = x - n;
#if defined(SD_BF16)
    Vec p = r * 0.0551716685f + 0.242611125f;
    p = p * r + 0.693260968f;
    p = p * r + 0.999928057f;
#else
    Vec p = r * 1.53458124e-4f + 1.33999309e-3f;
    p = p * r + 9.61848907e-3f;
    p = p * r + 0.0555032864f;
    p = p * r + 0.240226462f;
    p = p * r + 0.693147182f;
    p = p * r + 1.0f;
#endif
#if defined(__AVX512F__)
    return (Vec) _mm512_scalef_ps((__m512) p, (__m512) n);
#else
    return floats(bits(p) + ((bits(shifted) - bits(magic)) << 23));
#endif
}

constexpr float log2_of_e = 1.44269504f;

// 1 / (1 + e^(-x a))
SD_INLINE Vec sigmoid_of(Vec x, float a = 1.0f) {
    return inverse_of(1.0f + exp2_of(smaller(x * (-a * log2_of_e), splat(126.0f))));
}
SD_INLINE Vec silu_of(Vec x) { return x * sigmoid_of(x); }
SD_INLINE Vec quick_gelu_of(Vec x) { return x * sigmoid_of(x, 1.702f); }

// x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), Hendrycks and Gimpel 2016; (1 + tanh a) / 2 is sigmoid(2 a).
SD_INLINE Vec gelu_tanh_of(Vec x) { return x * sigmoid_of(x + 0.044715f * x * x * x, 1.5957691216f); }

// x / 2 (1 + erf(x / sqrt 2)) with erf by Abramowitz and Stegun 7.1.26, whose error is below 1.5e-7.
SD_INLINE Vec gelu_of(Vec x) {
    const Vec a = x < 0.0f ? -x : x;
    const Vec t = inverse_of(1.0f + 0.23164190f * a); // 0.3275911 / sqrt 2
    Vec       p = splat(0.5f * 1.061405429f);
    p = p * t - 0.5f * 1.453152027f;
    p = p * t + 0.5f * 1.421413741f;
    p = p * t - 0.5f * 0.284496736f;
    p = p * t + 0.5f * 0.254829592f;
    const Vec tail = x * (p * t * exp2_of(x * x * (-0.5f * log2_of_e))); // x / 2 (1 - erf(|x| / sqrt 2))
    return x < 0.0f ? tail : x - tail;
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
#if defined(__AVX512F__)
    return (Vec) _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from))), 16);
#else
    typedef uint16_t Half __attribute__((vector_size(2 * lanes)));
    Half             half;
    std::memcpy(&half, from, sizeof half);
    return (Vec) (__builtin_convertvector(half, UVec) << 16);
#endif
}

#ifdef SD_BF16
// Rounded to the nearest, ties to even: lane by lane, of both.
SD_INLINE void store_pair(uint32_t * to, Vec low, Vec high) {
    typedef uint16_t Halves __attribute__((vector_size(4 * lanes)));
    Halves           order;
    for (int i = 0; i < lanes; ++i) {
        order[2 * i] = static_cast<uint16_t>(i);
        order[2 * i + 1] = static_cast<uint16_t>(lanes + i);
    }
    const __m512i both = _mm512_permutexvar_epi16((__m512i) order, (__m512i) _mm512_cvtne2ps_pbh((__m512) high, (__m512) low));
    std::memcpy(to, &both, sizeof both);
}

SD_INLINE void store_bf16_upto(uint16_t * to, Vec v, int n) {
    const __m256bh half = _mm512_cvtneps_pbh((__m512) v);
    if (n >= lanes) {
        std::memcpy(to, &half, sizeof half);
    } else {
        std::memcpy(to, &half, 2 * static_cast<size_t>(n));
    }
}

// n floats, and a zero behind them where n is odd.
SD_INLINE void round_row(const float * from, uint16_t * to, int n) {
    int i = 0;
    for (; i + lanes <= n; i += lanes) {
        store_bf16_upto(to + i, load(from + i), lanes);
    }
    if (i < n) {
        store_bf16_upto(to + i, load_some(from + i, n - i), (n - i + 1) & ~1);
    }
}
#endif

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
