// The kernels, in terms of simd.h; included by one file per instruction set, which names it SD_SET.
#include "kernels/set.h"
#include "kernels/simd.h"
#ifdef SD_AMX
#include "kernels/amx.h"
#endif

namespace sd {
namespace {

#if defined(SD_AMX)
constexpr int vectors = 2; // two tiles side by side, whose rows then lie in one run
#elif defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int vectors = 4; // of a panel: 6 rows of 4 sums, 4 weights and one factor fill 32 registers
#else
constexpr int vectors = 2; // 16 registers
#endif
constexpr int panel = vectors * lanes;

// What products multiply: floats, or pairs of bf16 from neighbouring channels.
#ifdef SD_BF16
typedef uint32_t Number;
constexpr bool   products_in_bf16 = true;
#else
typedef float  Number;
constexpr bool products_in_bf16 = false;
#endif
constexpr int channels_of_number = products_in_bf16 ? 2 : 1;

#ifdef SD_AMX
constexpr int     channel_step = 32; // of a tile
constexpr int     depth = 2304, unpacking = 50;
constexpr int64_t weights_at_once = 768 << 10, sums_at_once = 2 << 20; // all processors with AMX have 2 MB a core
#else
constexpr int     channel_step = channels_of_number;
constexpr int     depth = products_in_bf16 ? 1536 : 768, unpacking = products_in_bf16 ? 18 : 12;
constexpr int64_t weights_at_once = 384 << 10, sums_at_once = 512 << 10;
#endif

SD_INLINE int64_t up_to(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Of some channels, filled up with zeros to whole steps.
SD_INLINE int numbers_of(int64_t channels) { return static_cast<int>(up_to(channels, channel_step) / channels_of_number); }

SD_INLINE Vec load_upto(const float * from, int n) { return n >= lanes ? load(from) : load_some(from, n); }
SD_INLINE void store_upto(float * to, Vec v, int n) {
    if (n >= lanes) {
        store(to, v);
    } else {
        store_some(to, v, n);
    }
}

// Of a result that may be bf16, which v is then rounded to.
SD_INLINE void put(const Activations & y, int64_t at, Vec v, int n) {
#ifdef SD_BF16
    if (y.bf16) {
        store_bf16_upto(static_cast<uint16_t *>(y.data) + at, v, n);
        return;
    }
#endif
    store_upto(static_cast<float *>(y.data) + at, v, n);
}

SD_INLINE Vec activated(Vec x, Activation activation) {
    switch (activation) {
        case Activation::silu: return silu_of(x);
        case Activation::gelu: return gelu_of(x);
        case Activation::quick_gelu: return quick_gelu_of(x);
        case Activation::gelu_tanh: return gelu_tanh_of(x);
        case Activation::none:
        case Activation::geglu: break;
    }
    return x;
}

#include "kernels/set_panels.inl"
#include "kernels/set_rows.inl"

#ifdef SD_AMX
#include "kernels/set_multiply_amx.inl"
#else
#include "kernels/set_multiply.inl"
#endif

#include "kernels/set_attention.inl"
#include "kernels/set_norms.inl"
#include "kernels/set_product.inl"

#ifdef SD_AMX
// Tiles multiply so fast that transforming for fewer products would cost more than it saves.
constexpr bool has_winograd = false;
constexpr auto pack = pack_taps;
constexpr auto product = product_of_rows;
constexpr auto row_scratch = scratch_of_rows;
#else
constexpr bool has_winograd = true;
#include "kernels/set_winograd.inl"
#endif

} // namespace

extern const KernelSet SD_SET;
const KernelSet        SD_SET{
    SD_SET_NAME, lanes,        panel,       depth,       unpacking, weights_at_once, sums_at_once, channel_step, products_in_bf16,
    has_winograd, panel_bytes, row_scratch, pack,        product,   head_scratch,    attention,    moments,      affine,
    normalise,   activate,     add,
};

} // namespace sd
