// The innermost loops, of AMX's tiles; part of set.inl.

constexpr int tile_rows = 32, attended = 16; // rows and queries at once
static_assert(lanes == 16 && products_in_bf16, "tiles are 16 floats wide, and their factors bf16");

// What a kernel that multiplies holds while it does.
struct Multiplier {
    Multiplier() { configure_tiles(); }
    ~Multiplier() { release_tiles(); }
    Multiplier(const Multiplier &) = delete;
    Multiplier & operator=(const Multiplier &) = delete;
};

// R rows, 16 or 32, and C times 16 columns, at most two: tile r + 2 c holds sums, 4 + r rows, 6 + c weights.
template <int R, int C>
SD_INLINE void multiply_columns(const Number * rows, int64_t row, int numbers, const Number * weights, int64_t weights_row,
                                float * total, int64_t total_row, bool add) {
    constexpr bool both_rows = R == 32, both_columns = C == 2;
    constexpr int  bytes = sizeof(Number);
    float * const  lower = total + 16 * total_row;
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
    for (int k = 0; k < numbers; k += 16, weights += 16 * weights_row) {
        load_tile<4>(rows + k, row * bytes);
        load_tile<6>(weights, weights_row * bytes);
        multiply_tiles<0, 4, 6>();
        if constexpr (both_rows) {
            load_tile<5>(rows + 16 * row + k, row * bytes);
            multiply_tiles<1, 5, 6>();
        }
        if constexpr (both_columns) {
            load_tile<7>(weights + 16, weights_row * bytes);
            multiply_tiles<2, 4, 7>();
        }
        if constexpr (both_rows && both_columns) multiply_tiles<3, 5, 7>();
    }
    store_tile<0>(total, total_row * bytes);
    if constexpr (both_rows) store_tile<1>(lower, total_row * bytes);
    if constexpr (both_columns) store_tile<2>(total + 16, total_row * bytes);
    if constexpr (both_rows && both_columns) store_tile<3>(lower + 16, total_row * bytes);
}

// total[r][j] (+)= sum over k of rows[r][k] * weights[k][j], for R rows and V vectors of columns. Rows, weights and totals
// lie row, weights_row and total_row apart; numbers are whole tiles.
template <int R, int V>
void multiply_evenly(const Number * rows, int64_t row, int numbers, const Number * weights, int64_t weights_row, float * total,
                     int64_t total_row, bool add) {
    for (int v = 0; v + 2 <= V; v += 2) {
        multiply_columns<R, 2>(rows, row, numbers, weights + v * lanes, weights_row, total + v * lanes, total_row, add);
    }
    if constexpr (V % 2 == 1) {
        multiply_columns<R, 1>(rows, row, numbers, weights + (V - 1) * lanes, weights_row, total + (V - 1) * lanes, total_row, add);
    }
}

// A line of the cache more than the numbers: of rows a power of two apart only a few would find a place in it.
SD_INLINE int64_t row_numbers(int taps, int length) { return int64_t{taps} * numbers_of(length) + 16; }

int64_t scratch_of_rows(Form, int taps, int length) { return int64_t{sizeof(Number)} * tile_rows * row_numbers(taps, length); }

// The left operands of up to R rows, with all taps one behind the other; where there are fewer, zeros fill up the tile.
template <int R> struct RowTile {
    const Number * rows[2];
    int64_t        row[2]; // numbers from one to the next

    RowTile(const Block & b, int64_t first, int count) {
        auto * scratch = static_cast<Number *>(b.scratch);
        for (int i = 0; i < b.count; ++i) {
            const Operand & o = b.operands[i];
            const Rows &    from = o.rows;
            if (from.bf16 && is_plain(from) && o.length % channel_step == 0 && count == R) {
                row[i] = from.pixel / channels_of_number;
                rows[i] = static_cast<const Number *>(from.x) + o.c0 / channels_of_number + first * row[i];
                continue;
            }
            const int taps = from.taps_w * from.taps_h, numbers = numbers_of(o.length);
            Number *  all = scratch;
            row[i] = row_numbers(taps, o.length);
            rows[i] = all;
            scratch += R * row[i];
            each_tap(from, first, count, o.c0, [&](int r, int tap, const void * x) __attribute__((always_inline)) {
                Number * to = all + r * row[i] + int64_t{tap} * numbers;
                if (!x || o.length % channel_step != 0) {
                    std::memset(to, 0, sizeof(Number) * static_cast<size_t>(numbers));
                }
                if (x) {
                    copy_numbers(x, from.bf16, o.length, to);
                }
            });
            std::memset(all + count * row[i], 0, sizeof(Number) * static_cast<size_t>((R - count) * row[i]));
        }
    }

    // The products with panel `number` of each operand.
    template <int V> void multiply_with(const Block & b, int64_t number, float * total) const {
        for (int i = 0; i < b.count; ++i) {
            const Operand & o = b.operands[i];
            const int       numbers = o.rows.taps_w * o.rows.taps_h * numbers_of(o.length);
            multiply_evenly<R, V>(rows[i], row[i], numbers, static_cast<const Number *>(o.panels) + number * numbers * panel,
                                  panel, total, panel, i > 0);
        }
    }
};
