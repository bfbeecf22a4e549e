// The innermost loops, of AMX's tiles; part of set.inl.

constexpr int tile_rows = 32;
constexpr int attended = 32, key_block = 128, softened = 8; // as in set_multiply.inl; all fits the first-level cache
static_assert(lanes == 16 && products_in_bf16, "tiles are 16 floats wide, and their factors bf16");

// What a kernel that multiplies holds while it does.
struct Multiplier {
    Multiplier() { configure_tiles(); }
    ~Multiplier() { release_tiles(); }
    Multiplier(const Multiplier &) = delete;
    Multiplier & operator=(const Multiplier &) = delete;
};

// The left operands of tiles: 16 rows or twice as many, of one tap after the other.
struct TileRows {
    const Number *  halves[2];
    int64_t         row;     // from one to the next
    int             numbers; // of a tap, whole tiles
    int             taps = 1;
    const int64_t * at = nullptr; // where taps begin in a half
};

// R rows, 16 or 32, and C times 16 columns, at most two: tile r + 2 c holds sums, 4 + r rows, 6 + c weights.
template <int R, int C>
SD_INLINE void multiply_columns(const TileRows & rows, const Number * weights, int64_t weights_row, float * total,
                                int64_t total_row, bool add) {
    constexpr bool both_rows = R == 32, both_columns = C == 2;
    constexpr int  bytes = sizeof(Number);
    float * const  lower = total + 16 * total_row;
    const TileRows r = rows; // what tiles are loaded from might be this struct, for all that a compiler knows
    if (add) {
        load_tile<0>(total, total_row * bytes);
        if constexpr (both_rows) load_tile<1>(lower, total_row * bytes);
        if constexpr (both_columns) load_tile<2>(total + 16, total_row * bytes);
        if constexpr (both_rows && both_columns) load_tile<3>(lower + 16, total_row * bytes);
    } else {
        zero_tile<0>();
        if constexpr (both_rows) zero_tile<1>();
        if constexpr (both_columns) zero_tile<2>();
        if constexpr (both_rows && both_columns) zero_tile<3>();
    }
    for (int tap = 0; tap < r.taps; ++tap) {
        const int64_t        at = r.at ? r.at[tap] : 0;
        const Number * const upper_rows = r.halves[0] + at;
        const Number * const lower_rows = r.halves[both_rows] + at;
        for (int k = 0; k < r.numbers; k += 16, weights += 16 * weights_row) {
            load_tile<4>(upper_rows + k, r.row * bytes);
            load_tile<6>(weights, weights_row * bytes);
            multiply_tiles<0, 4, 6>();
            if constexpr (both_rows) {
                load_tile<5>(lower_rows + k, r.row * bytes);
                multiply_tiles<1, 5, 6>();
            }
            if constexpr (both_columns) {
                load_tile<7>(weights + 16, weights_row * bytes);
                multiply_tiles<2, 4, 7>();
            }
            if constexpr (both_rows && both_columns) multiply_tiles<3, 5, 7>();
        }
    }
    store_tile<0>(total, total_row * bytes);
    if constexpr (both_rows) store_tile<1>(lower, total_row * bytes);
    if constexpr (both_columns) store_tile<2>(total + 16, total_row * bytes);
    if constexpr (both_rows && both_columns) store_tile<3>(lower + 16, total_row * bytes);
}

// total[r][j] (+)= sum over taps and k of rows[r][k] * weights[k][j], for R rows and V vectors of columns. Weights and
// totals lie weights_row and total_row apart.
template <int R, int V>
void multiply_rows(const TileRows & rows, const Number * weights, int64_t weights_row, float * total, int64_t total_row,
                   bool add) {
    for (int v = 0; v + 2 <= V; v += 2) {
        multiply_columns<R, 2>(rows, weights + v * lanes, weights_row, total + v * lanes, total_row, add);
    }
    if constexpr (V % 2 == 1) {
        multiply_columns<R, 1>(rows, weights + (V - 1) * lanes, weights_row, total + (V - 1) * lanes, total_row, add);
    }
}

// The same of rows that lie `row` apart.
template <int R, int V>
SD_INLINE void multiply_evenly(const Number * first, int64_t row, int numbers, const Number * weights, int64_t weights_row,
                               float * total, int64_t total_row, bool add) {
    multiply_rows<R, V>({{first, first + 16 * row}, row, numbers}, weights, weights_row, total, total_row, add);
}

// A line of the cache more than the numbers: of rows a power of two apart only a few would find a place in it.
SD_INLINE int64_t row_numbers(int taps, int length) { return int64_t{taps} * numbers_of(length) + 16; }

int64_t scratch_of_rows(Form, int taps, int length) { return int64_t{sizeof(Number)} * tile_rows * row_numbers(taps, length); }

// 16 rows that lie in one line share the pixels of their taps.
SD_INLINE bool shares_pixels(const Rows & r, int64_t first) {
    return r.stride < r.taps_w && r.out_width % 16 == 0 && first % 16 == 0;
}

SD_INLINE int shared_width(const Rows & r) { return 15 * r.stride + r.taps_w; }

// The numbers of a pixel, zeros where it is null.
SD_INLINE void put_pixel(const void * x, bool bf16, int length, Number * to) {
    const int  numbers = numbers_of(length);
    const bool whole = length % channel_step == 0;
    if (x && bf16 && whole) { // some vectors, for which memcpy() has long ways
        for (int i = 0; i < numbers; i += lanes) {
            store(reinterpret_cast<float *>(to) + i, load(static_cast<const float *>(x) + i));
        }
        return;
    }
    if (!x || !whole) {
        std::memset(to, 0, sizeof(Number) * static_cast<size_t>(numbers));
    }
    if (x) {
        copy_numbers(x, bf16, length, to);
    }
}

// The pixels that the taps of 16 rows see, line by line.
SD_INLINE void copy_shared(const Operand & o, int64_t first, Number * to) {
    const Rows &  r = o.rows;
    const int64_t size = r.bf16 ? 2 : 4, line = first / r.out_width, image = line / r.out_height;
    const auto *  x = static_cast<const char *>(r.x) + (image * r.image + o.c0) * size;
    const int     left = static_cast<int>(first % r.out_width) * r.stride - r.pad;
    const int     top = static_cast<int>(line % r.out_height) * r.stride - r.pad;
    const int     width = shared_width(r), numbers = numbers_of(o.length);
    for (int dy = 0; dy < r.taps_h; ++dy) {
        const int    down = source_at(top + dy, r.seen_height, r.height);
        const char * from = x + int64_t{down} * r.width * r.pixel * size;
        for (int i = 0; i < width; ++i, to += numbers) {
            const int across = source_at(left + i, r.seen_width, r.width);
            put_pixel(down < 0 || across < 0 ? nullptr : from + across * r.pixel * size, r.bf16, o.length, to);
        }
    }
}

// The left operands of up to R rows; where there are fewer, zeros fill up the tile.
template <int R> class RowTile {
  public:
    RowTile(const Block & b, int64_t first, int count) {
        auto * scratch = static_cast<Number *>(b.scratch);
        for (int i = 0; i < b.count; ++i) {
            const Operand & o = b.operands[i];
            const Rows &    from = o.rows;
            rows_[i].numbers = numbers_of(o.length);
            if (from.bf16 && is_plain(from) && o.length % channel_step == 0 && count == R) {
                leave(o, first, rows_[i]);
            } else if (shares_pixels(from, first) && count == R) {
                scratch = share(o, first, scratch, rows_[i], at_[i]);
            } else {
                scratch = gather(o, first, count, scratch, rows_[i]);
            }
        }
    }

    // The products with panel `number` of each operand.
    template <int V> void multiply_with(const Block & b, int64_t number, float * total) const {
        for (int i = 0; i < b.count; ++i) {
            const int64_t numbers = int64_t{rows_[i].taps} * rows_[i].numbers;
            multiply_rows<R, V>(rows_[i], static_cast<const Number *>(b.operands[i].panels) + number * numbers * panel, panel,
                                total, panel, i > 0);
        }
    }

  private:
    // They are used where they lie in x.
    static void leave(const Operand & o, int64_t first, TileRows & to) {
        to.row = o.rows.pixel / channels_of_number;
        to.halves[0] = static_cast<const Number *>(o.rows.x) + o.c0 / channels_of_number + first * to.row;
        to.halves[1] = to.halves[0] + 16 * to.row;
    }

    // Each half has the pixels that its taps see once, and a tap begins at one of them.
    static Number * share(const Operand & o, int64_t first, Number * scratch, TileRows & to, int64_t (&at)[max_taps]) {
        const Rows &  from = o.rows;
        const int     width = shared_width(from);
        const int64_t half = int64_t{to.numbers} * width * from.taps_h;
        to.row = int64_t{from.stride} * to.numbers;
        to.taps = from.taps_w * from.taps_h;
        to.at = at;
        for (int tap = 0; tap < to.taps; ++tap) {
            at[tap] = int64_t{to.numbers} * (tap / from.taps_w * width + tap % from.taps_w);
        }
        to.halves[0] = scratch;
        to.halves[1] = scratch + half;
        for (int h = 0; h < R / 16; ++h, scratch += half) {
            copy_shared(o, first + 16 * h, scratch);
        }
        return scratch;
    }

    // Each row has all its taps one behind the other, as if they were channels.
    static Number * gather(const Operand & o, int64_t first, int count, Number * scratch, TileRows & to) {
        const Rows &  from = o.rows;
        const int     taps = from.taps_w * from.taps_h;
        const int64_t numbers = to.numbers, row = row_numbers(taps, o.length);
        each_tap(from, first, count, o.c0, [&](int r, int tap, const void * x) __attribute__((always_inline)) {
            put_pixel(x, from.bf16, o.length, scratch + r * row + tap * numbers);
        });
        std::memset(scratch + count * row, 0, sizeof(Number) * static_cast<size_t>((R - count) * row));
        to.row = row;
        to.numbers *= taps;
        to.halves[0] = scratch;
        to.halves[1] = scratch + 16 * row;
        return scratch + R * row;
    }

    TileRows rows_[2];
    int64_t  at_[2][max_taps];
};
