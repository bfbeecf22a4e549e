// The kernels, in terms of simd.h; included by one file per instruction set, which names it SD_SET.
#include "kernels/set.h"
#include "kernels/simd.h"

namespace sd {
namespace {

#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int vectors = 4; // of a panel: 6 rows of 4 sums, 4 weights and one factor fill 32 registers
#else
constexpr int vectors = 2; // 16 registers
#endif
constexpr int panel = vectors * lanes;
constexpr int tile_rows = 6;

#ifdef SD_BF16
constexpr bool products_in_bf16 = true;
#else
constexpr bool products_in_bf16 = false;
#endif

SD_INLINE int even(int n) { return (n + 1) & ~1; }

// ---- weights ---------------------------------------------------------------------------------------------

int64_t panel_bytes(int taps, int length) {
    return products_in_bf16 ? int64_t{2} * panel * taps * even(length) : int64_t{4} * panel * taps * length;
}

template <Element element> SD_INLINE Vec load_element(const void * from, int64_t at, int n) {
    if constexpr (element == Element::f32) {
        const float * p = static_cast<const float *>(from) + at;
        return n >= lanes ? load(p) : load_some(p, n);
    } else {
        const uint16_t * p = static_cast<const uint16_t *>(from) + at;
        uint16_t         whole[lanes] = {};
        if (n < lanes) {
            std::memcpy(whole, p, 2 * static_cast<size_t>(n));
            p = whole;
        }
        return element == Element::f16 ? load_f16(p) : load_bf16(p);
    }
}

// Element j = channel * taps + tap of a weight's row goes to row tap * length + channel of the panel.
template <Element element> void transpose_into(const Pack & p, float * to, int64_t stride, int padded) {
    const int n = p.taps * p.length;
    int       channel = 0, tap = 0;
    for (int j = 0; j < n; j += lanes) {
        Vec rows[lanes];
        for (int i = 0; i < lanes; ++i) {
            rows[i] = i < p.rows ? load_element<element>(p.from, i * p.row + j, n - j) : Vec{};
        }
        transpose(rows);
        const int some = n - j < lanes ? n - j : lanes;
        for (int i = 0; i < some; ++i) {
            store(to + (static_cast<int64_t>(tap) * padded + channel) * stride, rows[i]);
            if (++tap == p.taps) {
                tap = 0;
                ++channel;
            }
        }
    }
}

void transpose_any(const Pack & p, float * to, int64_t stride, int padded) {
    switch (p.element) {
        case Element::f32: return transpose_into<Element::f32>(p, to, stride, padded);
        case Element::f16: return transpose_into<Element::f16>(p, to, stride, padded);
        case Element::bf16: return transpose_into<Element::bf16>(p, to, stride, padded);
    }
}

#ifdef SD_BF16
// Rounded to the nearest, ties to even; the upper half of each float is the result. NaN stays one.
SD_INLINE UVec round_bf16(Vec v) {
    const UVec raw = (UVec) v;
    const UVec rounded = raw + 0x7fffu + ((raw >> 16) & 1u);
    return v == v ? rounded : raw | 0x10000u;
}

SD_INLINE void store_pair(uint32_t * to, Vec low, Vec high) {
    const UVec both = (round_bf16(low) >> 16) | (round_bf16(high) & 0xffff0000u);
    std::memcpy(to, &both, sizeof both);
}

void pack(const Pack & p) {
    const int padded = even(p.length);
    if (padded != p.length) {
        for (int tap = 0; tap < p.taps; ++tap) {
            store(p.scratch + (static_cast<int64_t>(tap) * padded + p.length) * lanes, Vec{});
        }
    }
    transpose_any(p, p.scratch, lanes, padded);
    auto * to = static_cast<uint32_t *>(p.to) + p.column;
    for (int pair = 0; pair < p.taps * padded / 2; ++pair) {
        store_pair(to + static_cast<int64_t>(pair) * panel, load(p.scratch + 2 * pair * lanes),
                   load(p.scratch + (2 * pair + 1) * lanes));
    }
}
#else
void pack(const Pack & p) { transpose_any(p, static_cast<float *>(p.to) + p.column, panel, p.length); }
#endif

// ---- products --------------------------------------------------------------------------------------------

// sums[r][j] += rows[tap][r][k] * panel[k][j], for all taps and k; the panel's rows are `panel` apart.
template <int R, int V>
SD_INLINE void accumulate(Vec (&sums)[R][V], const float * const * rows, int taps, int length, const float * weights,
                          int64_t weights_row) {
    for (int tap = 0; tap < taps; ++tap, rows += R) {
        const float * row[R];
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
            row[r] = rows[r];
        }
        for (int k = 0; k < length; ++k, weights += weights_row) {
            Vec w[V];
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) {
                w[v] = load(weights + v * lanes);
            }
#pragma GCC unroll 6
            for (int r = 0; r < R; ++r) {
                const Vec x = splat(row[r][k]);
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v) {
                    sums[r][v] += x * w[v];
                }
            }
        }
    }
}

#ifdef SD_BF16
// The same with pairs: rows[tap][r][pair] are two bf16 side by side.
template <int R, int V>
SD_INLINE void accumulate_pairs(Vec (&sums)[R][V], const uint32_t * const * rows, int taps, int pairs,
                                const uint32_t * weights, int64_t weights_row) {
    for (int tap = 0; tap < taps; ++tap, rows += R) {
        const uint32_t * row[R];
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
            row[r] = rows[r];
        }
        for (int k = 0; k < pairs; ++k, weights += weights_row) {
            __m512bh w[V];
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) {
                w[v] = (__m512bh) _mm512_loadu_si512(weights + v * lanes);
            }
#pragma GCC unroll 6
            for (int r = 0; r < R; ++r) {
                const auto x = (__m512bh) _mm512_set1_epi32(static_cast<int>(row[r][k]));
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v) {
                    sums[r][v] = (Vec) _mm512_dpbf16_ps((__m512) sums[r][v], x, w[v]);
                }
            }
        }
    }
}

void round_row(const float * from, uint16_t * to, int n) {
    int i = 0;
    for (; i + lanes <= n; i += lanes) {
        const __m256bh half = _mm512_cvtneps_pbh((__m512) load(from + i));
        std::memcpy(to + i, &half, sizeof half);
    }
    if (i < n) {
        const __m256bh half = _mm512_cvtneps_pbh((__m512) load_some(from + i, n - i));
        std::memcpy(to + i, &half, 2 * static_cast<size_t>(even(n - i)));
    }
}
#endif

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

SD_INLINE Vec load_upto(const float * from, int n) { return n >= lanes ? load(from) : load_some(from, n); }
SD_INLINE void store_upto(float * to, Vec v, int n) {
    if (n >= lanes) {
        store(to, v);
    } else {
        store_some(to, v, n);
    }
}

SD_INLINE void put(const Activations & y, int64_t at, Vec v, int n) {
#ifdef SD_BF16
    if (y.bf16) {
        const __m256bh half = _mm512_cvtneps_pbh((__m512) v);
        std::memcpy(static_cast<uint16_t *>(y.data) + at, &half, 2 * static_cast<size_t>(n < lanes ? n : lanes));
        return;
    }
#endif
    store_upto(static_cast<float *>(y.data) + at, v, n);
}

SD_INLINE Vec finished(const Epilogue & e, Vec sum, int64_t row, int column, int n) {
    const int64_t image = e.scale || e.shift ? row / e.rows_per_image : 0;
    if (e.bias) {
        sum += load_upto(e.bias + column, n);
    }
    sum = activated(sum, e.activation);
    if (e.scale) {
        sum *= load_upto(e.scale + image * e.scale_image + column, n);
    }
    if (e.shift) {
        sum += load_upto(e.shift + image * e.shift_image + column, n);
    }
    if (e.residual) {
        sum += load_upto(e.residual + row * e.residual_row + column, n);
    }
    return sum;
}

// Where consecutive rows, one per output pixel, begin for each tap.
template <int R> SD_INLINE void find_rows(const Rows & r, int64_t row, int c0, const void ** to) {
    const int64_t size = r.bf16 ? 2 : 4;
    const auto *  x = static_cast<const char *>(r.x) + c0 * size;
    if (r.taps_w * r.taps_h == 1 && r.stride == 1 && r.seen_width == r.width && r.seen_height == r.height) {
        for (int i = 0; i < R; ++i) {
            to[i] = x + (row + i) * r.pixel * size;
        }
        return;
    }
    const int64_t line = row / r.out_width;
    int64_t       image = line / r.out_height;
    int           out_x = static_cast<int>(row % r.out_width), out_y = static_cast<int>(line % r.out_height);
    for (int i = 0; i < R; ++i) {
        const int left = out_x * r.stride - r.pad, top = out_y * r.stride - r.pad;
        for (int dy = 0, tap = 0; dy < r.taps_h; ++dy) {
            int        down = top + dy;
            const bool inside = down >= 0 && down < r.seen_height;
            if (r.seen_height != r.height) {
                down = static_cast<int>(static_cast<int64_t>(down) * r.height / r.seen_height);
            }
            for (int dx = 0; dx < r.taps_w; ++dx, ++tap) {
                int across = left + dx;
                if (!inside || across < 0 || across >= r.seen_width) {
                    to[tap * R + i] = r.zeros;
                    continue;
                }
                if (r.seen_width != r.width) {
                    across = static_cast<int>(static_cast<int64_t>(across) * r.width / r.seen_width);
                }
                to[tap * R + i] = x + (image * r.image + (static_cast<int64_t>(down) * r.width + across) * r.pixel) * size;
            }
        }
        if (++out_x == r.out_width) {
            out_x = 0;
            if (++out_y == r.out_height) {
                out_y = 0;
                ++image;
            }
        }
    }
}

// Where R rows of a block begin, for each operand and tap.
template <int R> struct RowTile {
    const void * rows[2][max_taps * R];

    RowTile(const Block & b, int64_t row) {
        for (int i = 0; i < b.count; ++i) {
            find_rows<R>(b.operands[i].rows, row, b.operands[i].c0, rows[i]);
        }
#ifdef SD_BF16
        auto * halves = static_cast<uint16_t *>(b.scratch);
        for (int i = 0; i < b.count; ++i) {
            const Operand & o = b.operands[i];
            const int       n = o.rows.bf16 ? 0 : o.rows.taps_w * o.rows.taps_h * R;
            for (int at = 0; at < n; ++at, halves += even(o.length)) {
                round_row(static_cast<const float *>(rows[i][at]), halves, o.length);
                rows[i][at] = halves;
            }
        }
#endif
    }

    // Adds the products with panel `number` of each operand.
    template <int V> inline __attribute__((always_inline)) void add_to(Vec (&sums)[R][V], const Block & b, int64_t number) const {
        for (int i = 0; i < b.count; ++i) {
            const Operand & o = b.operands[i];
            const int       taps = o.rows.taps_w * o.rows.taps_h;
#ifdef SD_BF16
            const int pairs = even(o.length) / 2;
            accumulate_pairs<R, V>(sums, reinterpret_cast<const uint32_t * const *>(rows[i]), taps, pairs,
                                   static_cast<const uint32_t *>(o.panels) + number * taps * pairs * panel, panel);
#else
            accumulate<R, V>(sums, reinterpret_cast<const float * const *>(rows[i]), taps, o.length,
                             static_cast<const float *>(o.panels) + number * taps * o.length * panel, panel);
#endif
        }
    }
};

// V vectors of one panel, all columns of which there are, or not.
template <bool whole, int R, int V>
SD_INLINE void write_tile(const Block & b, const Vec (&sums)[R][V], int64_t row, int column) {
    for (int r = 0; r < R; ++r) {
        float * y = static_cast<float *>(b.y.data) + (row + r) * b.y_row + b.y_column + column;
        for (int v = 0; v < V; ++v) {
            const int n = whole ? lanes : b.columns - column - v * lanes;
            Vec       sum = sums[r][v];
            if (!b.first) {
                sum += load_upto(y + v * lanes, n);
            }
            if (b.last) {
                sum = finished(*b.epilogue, sum, row + r, column + v * lanes, n);
            }
            store_upto(y + v * lanes, sum, n);
        }
    }
}

template <int R, int V> void product_tile(const Block & b, int64_t row, const RowTile<R> & rows, int number, int column) {
    Vec sums[R][V] = {};
    rows.template add_to<V>(sums, b, number);
    if (b.columns - column >= V * lanes) {
        write_tile<true>(b, sums, row, column);
    } else {
        write_tile<false>(b, sums, row, column);
    }
}

// A panel of values and the panel of their gates: y = (value + bias) gelu(gate + gate bias).
template <int R> void gated_tile(const Block & b, int64_t row, const RowTile<R> & rows, int number, int column) {
    Vec sums[2][R][vectors] = {};
    for (int half = 0; half < 2; ++half) {
        rows.template add_to<vectors>(sums[half], b, 2 * number + half);
    }
    for (int r = 0; r < R; ++r) {
        for (int v = 0; v < vectors; ++v) {
            const int at = column + v * lanes, n = b.columns - at;
            if (n <= 0) {
                break;
            }
            Vec value = sums[0][r][v], gate = sums[1][r][v];
            if (b.epilogue->bias) {
                value += load_upto(b.epilogue->bias + at, n);
                gate += load_upto(b.epilogue->gate_bias + at, n);
            }
            put(b.y, (row + r) * b.y_row + b.y_column + at, value * gelu_of(gate), n);
        }
    }
}

template <int R> void row_tile(const Block & b, int64_t row) {
    const RowTile<R> rows(b, row);
    const bool       gated = b.epilogue->activation == Activation::geglu;
    for (int column = 0, number = 0; column < b.columns; column += panel, ++number) {
        const int left = (b.columns - column + lanes - 1) / lanes;
        if (gated) {
            gated_tile<R>(b, row, rows, number, column);
        } else if (left >= vectors) {
            product_tile<R, vectors>(b, row, rows, number, column);
        } else if (left == 1) {
            product_tile<R, 1>(b, row, rows, number, column);
        } else if constexpr (vectors == 4) { // 2 or 3
            left == 2 ? product_tile<R, 2>(b, row, rows, number, column) : product_tile<R, 3>(b, row, rows, number, column);
        }
    }
}

int64_t row_scratch(int taps, int length) { return int64_t{2} * tile_rows * taps * (even(length) + lanes); }

void product(const Block & b) {
    int64_t row = b.first_row;
    for (; row + tile_rows <= b.end_row; row += tile_rows) {
        row_tile<tile_rows>(b, row);
    }
    for (; row + 2 <= b.end_row; row += 2) {
        row_tile<2>(b, row);
    }
    if (row < b.end_row) {
        row_tile<1>(b, row);
    }
}

// ---- attention -------------------------------------------------------------------------------------------
// Scores of a few queries and keys at a time stay in the cache, and sums are scaled down whenever a larger score turns
// up (Milakov and Gimelshein, 2018; Dao et al., 2022).

constexpr int query_block = 16 * tile_rows;
constexpr int key_block = 256;

template <int n> struct Number {
    static constexpr int value = n;
};

SD_INLINE int64_t up_to(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

struct HeadScratch {
    float *keys, *values, *queries, *rounded, *scores, *sums, *most, *total, *packing;
    int64_t bytes;

    HeadScratch(void * at, int64_t n, int size) {
        const int64_t padded = up_to(n, panel), width = up_to(size, lanes);
        auto *        next = static_cast<float *>(at);
        const auto    take = [&](int64_t floats) {
            float * taken = next;
            next += up_to(floats, 16);
            return taken;
        };
        keys = take(padded * even(size));
        values = take(padded * width);
        queries = take(static_cast<int64_t>(query_block) * even(size));
        rounded = take(tile_rows * key_block);
        scores = take(tile_rows * key_block);
        sums = take(query_block * width);
        most = take(query_block);
        total = take(query_block);
        packing = take(lanes * int64_t{even(size)});
        bytes = 4 * (next - static_cast<float *>(at));
    }
};

int64_t head_scratch(int64_t keys, int size) { return HeadScratch(nullptr, keys, size).bytes; }

void pack_keys(const Head & h, const HeadScratch & s) {
    const int64_t width = up_to(h.size, lanes);
    for (int64_t first = 0; first < h.keys; first += panel) {
        for (int v = 0; v < vectors; ++v) {
            const int64_t key = first + v * lanes, left = h.keys - key;
            pack({h.k + key * h.k_row, Element::f32, h.k_row, static_cast<int>(left < 0 ? 0 : left < lanes ? left : lanes), 1,
                  h.size, reinterpret_cast<char *>(s.keys) + first / panel * panel_bytes(1, h.size), v * lanes, s.packing});
        }
    }
    const auto value = [&](int64_t key, int at) {
        return key < h.keys ? load_upto(h.v + key * h.v_row + at, h.size - at) : Vec{};
    };
    for (int64_t key = 0; key < up_to(h.keys, panel); key += products_in_bf16 ? 2 : 1) {
        for (int at = 0; at < width; at += lanes) {
#ifdef SD_BF16
            store_pair(reinterpret_cast<uint32_t *>(s.values) + key / 2 * width + at, value(key, at), value(key + 1, at));
#else
            store(s.values + key * width + at, value(key, at));
#endif
        }
    }
}

constexpr float log2_of_e = 1.44269504f; // scores are powers of 2
constexpr float nothing = -1e30f;        // the score of what is not to be seen: finite, so that differences are

template <int R> SD_INLINE void score(const Head & h, const HeadScratch & s, int64_t query, int at, int64_t key, int keys) {
#ifdef SD_BF16
    const int        pairs = even(h.size) / 2;
    const uint32_t * rows[R];
    for (int r = 0; r < R; ++r) {
        rows[r] = reinterpret_cast<uint32_t *>(s.queries) + (at + r) * pairs;
    }
#else
    const float * rows[R];
    for (int r = 0; r < R; ++r) {
        rows[r] = s.queries + static_cast<int64_t>(at + r) * h.size;
    }
#endif
    for (int first = 0; first < keys; first += panel) {
        const void * weights = reinterpret_cast<char *>(s.keys) + (key + first) / panel * panel_bytes(1, h.size);
        Vec          sums[R][vectors] = {};
#ifdef SD_BF16
        accumulate_pairs<R, vectors>(sums, rows, 1, pairs, static_cast<const uint32_t *>(weights), panel);
#else
        accumulate<R, vectors>(sums, rows, 1, h.size, static_cast<const float *>(weights), panel);
#endif
        for (int r = 0; r < R; ++r) {
            for (int v = 0; v < vectors; ++v) {
                store(s.scores + r * key_block + first + v * lanes, sums[r][v]);
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        float * scores = s.scores + r * key_block;
        if (h.mask) {
            const float * mask = h.mask + (query + at + r) * h.mask_row + key;
            for (int i = 0; i < keys; ++i) {
                const float sum = scores[i] + mask[i] * log2_of_e;
                scores[i] = sum > nothing ? sum : nothing;
            }
        }
        for (int i = keys; i < up_to(keys, lanes); ++i) {
            scores[i] = nothing;
        }
    }
}

// R queries, beginning with number `at` of the block, see `keys` keys.
template <int R> void attend(const Head & h, const HeadScratch & s, int64_t query, int at, int64_t key, int keys) {
    score<R>(h, s, query, at, key, keys);
    const int64_t width = up_to(h.size, lanes);
    Vec           fade[R], most[R], total[R] = {};
    const void *  rows[R];
    for (int r = 0; r < R; ++r) {
        most[r] = splat(s.most[at + r]);
    }
    for (int i = 0; i < keys; i += lanes) { // all rows at once, whose chains of results do not wait for each other
        for (int r = 0; r < R; ++r) {
            most[r] = larger(most[r], load(s.scores + r * key_block + i));
        }
    }
    for (int r = 0; r < R; ++r) {
        most[r] = largest_of(most[r]);
        fade[r] = exp2_of<false>(s.most[at + r] - most[r]);
        s.most[at + r] = most[r][0];
    }
    for (int i = 0; i < keys; i += lanes) {
        for (int r = 0; r < R; ++r) {
            float *   scores = s.scores + r * key_block + i;
            const Vec p = exp2_of<products_in_bf16>(load(scores) - most[r]);
            total[r] += p;
#ifdef SD_BF16
            const __m256bh half = _mm512_cvtneps_pbh((__m512) p);
            std::memcpy(reinterpret_cast<uint16_t *>(s.rounded) + r * key_block + i, &half, sizeof half);
#else
            store(scores, p);
#endif
        }
    }
    for (int r = 0; r < R; ++r) {
        s.total[at + r] = (s.total[at + r] * fade[r] + sum_of(total[r]))[0];
#ifdef SD_BF16
        rows[r] = reinterpret_cast<uint16_t *>(s.rounded) + r * key_block;
#else
        rows[r] = s.scores + r * key_block;
#endif
    }
    const auto columns = [&](auto number, int64_t first) __attribute__((always_inline)) {
        constexpr int V = decltype(number)::value;
        Vec           sums[R][V];
        for (int r = 0; r < R; ++r) {
            for (int v = 0; v < V; ++v) {
                sums[r][v] = load(s.sums + (at + r) * width + first + v * lanes) * fade[r];
            }
        }
#ifdef SD_BF16
        accumulate_pairs<R, V>(sums, reinterpret_cast<const uint32_t * const *>(rows), 1, even(keys) / 2,
                               reinterpret_cast<uint32_t *>(s.values) + key / 2 * width + first, width);
#else
        accumulate<R, V>(sums, reinterpret_cast<const float * const *>(rows), 1, keys, s.values + key * width + first, width);
#endif
        for (int r = 0; r < R; ++r) {
            for (int v = 0; v < V; ++v) {
                store(s.sums + (at + r) * width + first + v * lanes, sums[r][v]);
            }
        }
    };
    for (int64_t first = 0; first < width;) {
        const int64_t left = (width - first) / lanes;
        if (left >= vectors && left != vectors + 1) {
            columns(Number<vectors>{}, first);
            first += vectors * lanes;
        } else if (left == 1) {
            columns(Number<1>{}, first);
            first += lanes;
        } else if (left == 2 || vectors == 2) {
            columns(Number<2>{}, first);
            first += 2 * lanes;
        } else { // 3, and 5 as 3 and 2
            columns(Number<vectors == 4 ? 3 : 2>{}, first);
            first += 3 * lanes;
        }
    }
}

void attention(const Head & h) {
    const HeadScratch s(h.scratch, h.keys, h.size);
    const int64_t     width = up_to(h.size, lanes);
    pack_keys(h, s);
    for (int64_t query = h.first_query; query < h.end_query; query += query_block) {
        const int queries = static_cast<int>(h.end_query - query < query_block ? h.end_query - query : query_block);
        for (int i = 0; i < queries; ++i) {
            float * scaled = products_in_bf16 ? s.packing : s.queries + static_cast<int64_t>(i) * h.size;
            for (int at = 0; at < h.size; ++at) {
                scaled[at] = h.q[(query + i) * h.q_row + at] * (h.scale * log2_of_e);
            }
#ifdef SD_BF16
            round_row(scaled, reinterpret_cast<uint16_t *>(s.queries) + static_cast<int64_t>(i) * even(h.size), h.size);
#endif
            s.most[i] = nothing;
            s.total[i] = 0;
        }
        std::memset(s.sums, 0, sizeof(float) * static_cast<size_t>(queries * width));
        for (int64_t key = 0; key < h.keys; key += key_block) {
            const int keys = static_cast<int>(h.keys - key < key_block ? h.keys - key : key_block);
            int       at = 0;
            for (; at + tile_rows <= queries; at += tile_rows) {
                attend<tile_rows>(h, s, query, at, key, keys);
            }
            for (; at < queries; ++at) {
                attend<1>(h, s, query, at, key, keys);
            }
        }
        for (int i = 0; i < queries; ++i) {
            for (int at = 0; at < h.size; at += lanes) {
                put(h.out, (query + i) * h.out_row + h.out_column + at, load(s.sums + i * width + at) / s.total[i], h.size - at);
            }
        }
    }
}

// ---- norms and what works element by element -------------------------------------------------------------

template <int V>
SD_INLINE void moments_of(const float * x, int64_t rows, int64_t row, float * mean, float * squares) {
    Vec sums[V] = {};
    for (int64_t r = 0; r < rows; ++r) {
        for (int v = 0; v < V; ++v) {
            sums[v] += load(x + r * row + v * lanes);
        }
    }
    Vec means[V], distances[V] = {};
    for (int v = 0; v < V; ++v) {
        means[v] = sums[v] / static_cast<float>(rows);
        store(mean + v * lanes, means[v]);
    }
    for (int64_t r = 0; r < rows; ++r) {
        for (int v = 0; v < V; ++v) {
            const Vec distance = load(x + r * row + v * lanes) - means[v];
            distances[v] += distance * distance;
        }
    }
    for (int v = 0; v < V; ++v) {
        store(squares + v * lanes, distances[v]);
    }
}

void moments(const float * x, int64_t rows, int64_t row, int64_t channels, float * mean, float * squares) {
    int64_t c = 0;
    for (; c + 4 * lanes <= channels; c += 4 * lanes) {
        moments_of<4>(x + c, rows, row, mean + c, squares + c);
    }
    for (; c + lanes <= channels; c += lanes) {
        moments_of<1>(x + c, rows, row, mean + c, squares + c);
    }
    for (; c < channels; ++c) {
        float sum = 0, distances = 0;
        for (int64_t r = 0; r < rows; ++r) {
            sum += x[r * row + c];
        }
        mean[c] = sum / static_cast<float>(rows);
        for (int64_t r = 0; r < rows; ++r) {
            const float distance = x[r * row + c] - mean[c];
            distances += distance * distance;
        }
        squares[c] = distances;
    }
}

void affine(const float * x, Activations y, int64_t first, int64_t rows, int64_t channels, const float * centre,
            const float * scale, const float * shift, Activation activation) {
    for (int64_t r = 0; r < rows; ++r, x += channels, first += channels) {
        for (int64_t c = 0; c < channels; c += lanes) {
            const int n = static_cast<int>(channels - c < lanes ? channels - c : lanes);
            const Vec value = (load_upto(x + c, n) - load_upto(centre + c, n)) * load_upto(scale + c, n) + load_upto(shift + c, n);
            put(y, first + c, activated(value, activation), n);
        }
    }
}

void normalise(const float * x, Activations y, int64_t first, int64_t rows, int64_t channels, const float * weight,
               const float * bias, float eps, bool rms) {
    for (int64_t r = 0; r < rows; ++r, x += channels, first += channels) {
        float mean = 0, squares = 0;
        if (!rms) {
            Vec sum{};
            for (int64_t c = 0; c < channels; c += lanes) {
                sum += load_upto(x + c, static_cast<int>(channels - c < lanes ? channels - c : lanes));
            }
            mean = sum_of(sum)[0] / static_cast<float>(channels);
        }
        Vec sum{};
        int64_t c = 0;
        for (; c + lanes <= channels; c += lanes) {
            const Vec distance = load(x + c) - mean;
            sum += distance * distance;
        }
        squares = sum_of(sum)[0];
        for (; c < channels; ++c) {
            squares += (x[c] - mean) * (x[c] - mean);
        }
        const float scale = 1.0f / __builtin_sqrtf(squares / static_cast<float>(channels) + eps);
        for (c = 0; c < channels; c += lanes) {
            const int n = static_cast<int>(channels - c < lanes ? channels - c : lanes);
            Vec       value = (load_upto(x + c, n) - mean) * scale;
            if (weight) {
                value *= load_upto(weight + c, n);
            }
            if (bias) {
                value += load_upto(bias + c, n);
            }
            put(y, first + c, value, n);
        }
    }
}

void activate(const float * x, float * y, int64_t n, Activation activation) {
    for (int64_t i = 0; i < n; i += lanes) {
        const int some = static_cast<int>(n - i < lanes ? n - i : lanes);
        store_upto(y + i, activated(load_upto(x + i, some), activation), some);
    }
}

void add(const float * x, const float * y, float * to, int64_t n) {
    for (int64_t i = 0; i < n; i += lanes) {
        const int some = static_cast<int>(n - i < lanes ? n - i : lanes);
        store_upto(to + i, load_upto(x + i, some) + load_upto(y + i, some), some);
    }
}

} // namespace

extern const KernelSet SD_SET;
const KernelSet        SD_SET{
    SD_SET_NAME, lanes, panel,   products_in_bf16, panel_bytes, row_scratch, pack,     product,
    head_scratch, attention, moments, affine,       normalise,   activate,    add,
};

} // namespace sd
