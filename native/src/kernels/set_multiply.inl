// The innermost loops, of vectors; part of set.inl.

constexpr int tile_rows = 6;
// Queries and keys that are multiplied, and rows of scores that become chances, at a time.
constexpr int attended = 6, key_block = 256, softened = 6;

// What a kernel that multiplies holds while it does.
struct Multiplier {
    Multiplier() {}
};

// A longer running sum of f32 loses digits; of bf16 they are lost already.
constexpr int longest_sum = products_in_bf16 ? 1 << 30 : 96;

SD_INLINE void multiply_add(Vec & sum, Number x, Vec w) {
#ifdef SD_BF16
    const auto pair = (__m512bh) _mm512_set1_epi32(static_cast<int>(x));
    sum = (Vec) _mm512_dpbf16_ps((__m512) sum, pair, (__m512bh) w);
#else
    sum += x * w;
#endif
}

SD_INLINE Vec load_numbers(const Number * from) {
    Vec v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

template <int R, int V, bool add>
SD_INLINE void multiply_some(const Number * const * rows, int first, int end, const Number * weights, int64_t weights_row,
                             float * total, int64_t total_row) {
    const Number * row[R];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
        row[r] = rows[r];
    }
    Vec sums[R][V];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            sums[r][v] = Vec{};
        }
    }
    for (int k = first; k < end; ++k, weights += weights_row) {
        Vec w[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            w[v] = load_numbers(weights + v * lanes);
        }
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
            const Number x = row[r][k];
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) {
                multiply_add(sums[r][v], x, w[v]);
            }
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            float * to = total + r * total_row + v * lanes;
            store(to, add ? load(to) + sums[r][v] : sums[r][v]);
        }
    }
}

// total[r][j] (+)= sum over k of rows[r][k] * weights[k][j], for R rows and V vectors of columns. Weights and totals lie
// weights_row and total_row apart.
template <int R, int V>
void multiply(const Number * const * rows, int numbers, const Number * weights, int64_t weights_row, float * total,
              int64_t total_row, bool add) {
    const int parts = (numbers - 1) / longest_sum + 1, at_once = (numbers - 1) / parts + 1;
    for (int first = 0; first < numbers; first += at_once, add = true) {
        const int end = first + at_once < numbers ? first + at_once : numbers;
        if (add) {
            multiply_some<R, V, true>(rows, first, end, weights + first * weights_row, weights_row, total, total_row);
        } else {
            multiply_some<R, V, false>(rows, first, end, weights + first * weights_row, weights_row, total, total_row);
        }
    }
}

// The same of rows that lie `row` apart.
template <int R, int V>
SD_INLINE void multiply_evenly(const Number * first, int64_t row, int numbers, const Number * weights, int64_t weights_row,
                               float * total, int64_t total_row, bool add) {
    const Number * rows[R];
    for (int r = 0; r < R; ++r) {
        rows[r] = first + r * row;
    }
    multiply<R, V>(rows, numbers, weights, weights_row, total, total_row, add);
}

// Where the R rows of a tile begin, for each operand and tap.
template <int R> struct RowTile {
    const Number * rows[2][max_taps * R];

    RowTile(const Block & b, int64_t first, int) {
        auto * scratch = static_cast<Number *>(b.scratch);
        for (int i = 0; i < b.count; ++i) {
            const Operand & o = b.operands[i];
            const Rows &    from = o.rows;
            const bool      as_is = from.bf16 == products_in_bf16;
            if (as_is && is_plain(from)) {
                const auto * x = static_cast<const Number *>(from.x) + o.c0 / channels_of_number;
                for (int r = 0; r < R; ++r) {
                    rows[i][r] = x + (first + r) * (from.pixel / channels_of_number);
                }
                continue;
            }
            each_tap(from, first, R, o.c0, [&](int r, int tap, const void * x) __attribute__((always_inline)) {
                if (!x) {
                    x = from.zeros;
                } else if (!as_is) {
                    copy_numbers(x, from.bf16, o.length, scratch);
                    x = scratch;
                    scratch += numbers_of(o.length);
                }
                rows[i][tap * R + r] = static_cast<const Number *>(x);
            });
        }
    }

    // The products with panel `number` of each operand.
    template <int V> void multiply_with(const Block & b, int64_t number, float * total) const {
        for (int i = 0; i < b.count; ++i) {
            const Operand & o = b.operands[i];
            const int       taps = o.rows.taps_w * o.rows.taps_h, numbers = numbers_of(o.length);
            const Number *  weights = static_cast<const Number *>(o.panels) + number * taps * numbers * panel;
            for (int tap = 0; tap < taps; ++tap, weights += int64_t{numbers} * panel) {
                multiply<R, V>(rows[i] + tap * R, numbers, weights, panel, total, panel, i + tap > 0);
            }
        }
    }
};

int64_t scratch_of_rows(Form, int taps, int length) {
    return products_in_bf16 ? int64_t{sizeof(Number)} * tile_rows * taps * numbers_of(length) : 0;
}
