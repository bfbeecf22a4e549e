// Convolutions 3x3 of stride 1 by minimal filtering, F(2x2, 3x3) of Winograd 1980 and Lavin and Gray 2016; part of set.inl.
// Along an axis two neighbouring results of three taps w and four inputs x are A^T (G w * B^T x), with four products in the
// place of six: of both axes 16 in the place of 36. Where x was enlarged to twice its size, two of the four inputs are the
// same; then one product of four is always zero, is left out, and 9 remain.

template <Form form> constexpr int side = form == Form::winograd ? 4 : 3; // of a tile of inputs, and of its products

// B^T x in place, of x that lie `step` apart.
template <int n> SD_INLINE void transform_inputs(Vec * x, int step) {
    const Vec a = x[0], b = x[step], c = x[2 * step];
    if constexpr (n == 4) {
        x[0] = a - c;
        x[step] = b + c;
        x[2 * step] = c - b;
        x[3 * step] = b - x[3 * step];
    } else {
        x[0] = a - b;
        x[2 * step] = b - c;
    }
}

// G w.
template <int n> SD_INLINE void transform_taps(const Vec * w, int w_step, Vec * to, int step) {
    const Vec outer = w[0] + w[2 * w_step], middle = w[w_step];
    to[0] = w[0];
    to[(n - 1) * step] = w[2 * w_step];
    if constexpr (n == 4) {
        to[step] = 0.5f * (outer + middle);
        to[2 * step] = 0.5f * (outer - middle);
    } else {
        to[step] = outer + middle;
    }
}

// A^T m.
template <int n> SD_INLINE void transform_products(const Vec * m, int m_step, Vec * to, int step) {
    const Vec same = m[m_step];
    if constexpr (n == 4) {
        const Vec other = m[2 * m_step];
        to[0] = m[0] + same + other;
        to[step] = same - other - m[3 * m_step];
    } else {
        to[0] = m[0] + same;
        to[step] = same - m[2 * m_step];
    }
}

// ---- weights ---------------------------------------------------------------------------------------------

// Of one channel, from its taps, which lie tap_step vectors apart.
template <Form form> SD_INLINE void filter_taps(const float * from, int64_t tap_step, Vec (&to)[side<form> * side<form>]) {
    constexpr int n = side<form>;
    Vec           rows[3 * n];
#pragma GCC unroll 3
    for (int y = 0; y < 3; ++y) {
        const float * line = from + 3 * y * tap_step;
        const Vec     taps[3] = {load(line), load(line + tap_step), load(line + 2 * tap_step)};
        transform_taps<n>(taps, 1, rows + n * y, 1);
    }
#pragma GCC unroll 4
    for (int x = 0; x < n; ++x) {
        transform_taps<n>(rows + x, n, to + x, n);
    }
}

// Panels hold the transformed taps as they hold taps. As many channels at a time as a vector has lanes stay in the first-level
// cache between the two steps.
template <Form form> void pack_filter(const Pack & p) {
    constexpr int products = side<form> * side<form>;
    const int     padded = numbers_of(p.length) * channels_of_number, at_once = padded < lanes ? padded : lanes;
    const int64_t tap_step = at_once * lanes, product_step = int64_t{numbers_of(p.length)} * panel;
    Number *      to = static_cast<Number *>(p.to) + p.column;
    Pack          some = p;
    for (int first = 0; first < p.length; first += lanes) {
        some.length = p.length - first < lanes ? p.length - first : lanes;
        transpose_any(some, p.scratch, lanes, at_once);
        some.from = static_cast<const char *>(some.from) + int64_t{9} * lanes * (p.element == Element::f32 ? 4 : 2);
        for (int tap = 0; tap < 9 && some.length % channels_of_number != 0; ++tap) {
            store(p.scratch + tap * tap_step + some.length * lanes, Vec{});
        }
        for (int channel = 0; channel < some.length; channel += channels_of_number, to += panel) {
            Vec taps[products];
            filter_taps<form>(p.scratch + channel * lanes, tap_step, taps);
#ifdef SD_BF16
            Vec next[products];
            filter_taps<form>(p.scratch + (channel + 1) * lanes, tap_step, next);
#endif
#pragma GCC unroll 16
            for (int i = 0; i < products; ++i) {
#ifdef SD_BF16
                store_pair(to + i * product_step, taps[i], next[i]);
#else
                store(to + i * product_step, taps[i]);
#endif
            }
        }
    }
}

// ---- inputs ----------------------------------------------------------------------------------------------

// Two by two results, in lines from left to right. The right and the lower ones may lie outside of the picture.
struct Tile {
    int64_t image;
    int     y, x;
};

// Of a row that begins a pair of lines.
SD_INLINE Tile tile_at(const Rows & r, int64_t row) {
    const int64_t line = row / r.out_width;
    return {line / r.out_height, static_cast<int>(line % r.out_height), 0};
}

SD_INLINE int64_t tiles_before(const Rows & r, int64_t row) {
    const Tile tile = tile_at(r, row);
    return (tile.image * ((r.out_height + 1) / 2) + tile.y / 2) * ((r.out_width + 1) / 2);
}

SD_INLINE void advance(const Rows & r, Tile & tile) {
    tile.x += 2;
    if (tile.x >= r.out_width) {
        tile.x = 0;
        tile.y += 2;
        if (tile.y >= r.out_height) {
            tile.y = 0;
            ++tile.image;
        }
    }
}

SD_INLINE int64_t first_row(const Rows & r, const Tile & tile) {
    return (tile.image * r.out_height + tile.y) * r.out_width + tile.x;
}

// Of a tile's results; -1 outside.
struct ResultRows {
    int64_t at[4];

    void set(const Rows & r, const Tile & tile) {
        const bool right = tile.x + 1 < r.out_width, below = tile.y + 1 < r.out_height;
        at[0] = first_row(r, tile);
        at[1] = right ? at[0] + 1 : -1;
        at[2] = below ? at[0] + r.out_width : -1;
        at[3] = right && below ? at[2] + 1 : -1;
    }
};

// Numbers of `n` channels from `channel` on.
SD_INLINE void put_numbers(Number * to, int channel, Vec v, int n) {
#ifdef SD_BF16
    store_bf16_upto(reinterpret_cast<uint16_t *>(to) + channel, v, (n + 1) & ~1);
#else
    store_upto(to + channel, v, n);
#endif
}

// Where the inputs of a tile lie in x, -1 outside: of a doubled picture where its pixels came from.
template <Form form> SD_INLINE int source_line(const Rows & r, const Tile & tile, int i) {
    return form == Form::winograd_doubled ? source_at(tile.y / 2 + i - 1, r.height, r.height)
                                          : source_at(tile.y + i - 1, r.seen_height, r.height);
}
template <Form form> SD_INLINE int source_column(const Rows & r, const Tile & tile, int i) {
    return form == Form::winograd_doubled ? source_at(tile.x / 2 + i - 1, r.width, r.width)
                                          : source_at(tile.x + i - 1, r.seen_width, r.width);
}

// Where the inputs of one tile begin.
template <Form form> SD_INLINE void find_inputs(const Operand & o, const Tile & tile, const void ** pixels) {
    constexpr int n = side<form>;
    const Rows &  r = o.rows;
    const int64_t size = r.bf16 ? 2 : 4;
    const auto *  x = static_cast<const char *>(r.x) + (tile.image * r.image + o.c0) * size;
    int           across[n];
    for (int i = 0; i < n; ++i) {
        across[i] = source_column<form>(r, tile, i);
    }
    for (int i = 0; i < n; ++i) {
        const int down = source_line<form>(r, tile, i);
        for (int j = 0; j < n; ++j) {
            pixels[n * i + j] = down < 0 || across[j] < 0 ? r.zeros : x + (int64_t{down} * r.width + across[j]) * r.pixel * size;
        }
    }
}

// Some channels of R tiles. What a tile shares with the one to its left is transformed along the columns already.
template <Form form, Element element, int R>
SD_INLINE void filter_channels(const void * const (&pixels)[R][side<form> * side<form>], const bool (&follows)[R],
                               int channel, int count, Number * to, int64_t tile_step, int64_t step) {
    constexpr int n = side<form>;
    Vec           shared[2 * n];
    const auto    column = [&](const void * const * from, Vec * x) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int i = 0; i < n; ++i) {
            x[n * i] = load_element<element>(from[n * i], channel, count);
        }
        transform_inputs<n>(x, n);
    };
    for (int tile = 0; tile < R; ++tile, to += tile_step) {
        Vec x[n * n];
        if (follows[tile]) {
#pragma GCC unroll 4
            for (int i = 0; i < n; ++i) {
                x[n * i] = shared[2 * i];
                x[n * i + 1] = shared[2 * i + 1];
            }
        } else {
            column(pixels[tile], x);
            column(pixels[tile] + 1, x + 1);
        }
#pragma GCC unroll 2
        for (int j = 2; j < n; ++j) {
            column(pixels[tile] + j, x + j);
        }
#pragma GCC unroll 4
        for (int i = 0; i < n; ++i) {
            shared[2 * i] = x[n * i + n - 2];
            shared[2 * i + 1] = x[n * i + n - 1];
            transform_inputs<n>(x + n * i, 1);
        }
#pragma GCC unroll 16
        for (int i = 0; i < n * n; ++i) {
            put_numbers(to + i * step, channel, x[i], count);
        }
    }
}

template <Form form, Element element, int R>
void filter_inputs(const Operand & o, const Tile (&tiles)[R], Number * to, int64_t tile_step, int64_t step) {
    const void * pixels[R][side<form> * side<form>];
    bool         follows[R];
    for (int i = 0; i < R; ++i) {
        find_inputs<form>(o, tiles[i], pixels[i]);
        follows[i] = i > 0 && tiles[i].x > 0;
    }
    int channel = 0;
    for (; channel + lanes <= o.length; channel += lanes) {
        filter_channels<form, element, R>(pixels, follows, channel, lanes, to, tile_step, step);
    }
    if (channel < o.length) {
        filter_channels<form, element, R>(pixels, follows, channel, o.length - channel, to, tile_step, step);
    }
}

// Asks for the inputs that no tile to the left or above has.
template <Form form> SD_INLINE void expect_inputs(const Operand & o, const Tile & tile) {
    constexpr int n = side<form>, first = n - (form == Form::winograd ? 2 : 1);
    const int     bytes = o.length * (o.rows.bf16 ? 2 : 4);
    const void *  pixels[n * n];
    find_inputs<form>(o, tile, pixels);
    for (int i = first; i < n; ++i) {
        for (int j = first; j < n; ++j) {
            for (int at = 0; at < bytes; at += 64) {
                __builtin_prefetch(static_cast<const char *>(pixels[n * i + j]) + at);
            }
        }
    }
}

// ---- products --------------------------------------------------------------------------------------------

// Some vectors of one panel, all columns of which there are, or not.
template <Form form, bool whole>
void filter_results(const Block & b, const ResultRows & rows, const float * products, int64_t step, int column, int some) {
    constexpr int n = side<form>;
    const Writer  writer(b, column);
    Writer::Row   to[4];
    for (int i = 0; i < 4; ++i) {
        to[i] = rows.at[i] < 0 ? Writer::Row{} : writer.row(rows.at[i]);
    }
    for (int v = 0; v < some; ++v) {
        Vec m[n * n], half[2 * n], y[4];
#pragma GCC unroll 16
        for (int i = 0; i < n * n; ++i) {
            m[i] = load(products + i * step + v * lanes);
        }
#pragma GCC unroll 4
        for (int i = 0; i < n; ++i) {
            transform_products<n>(m + i, n, half + i, n);
        }
        transform_products<n>(half, 1, y, 1);
        transform_products<n>(half + n, 1, y + 2, 1);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            if (rows.at[i] >= 0) {
                writer.write(to[i], y[i], v * lanes, whole ? lanes : b.columns - column - v * lanes);
            }
        }
    }
}

// R tiles, `tile` and those after it, against all panels; `tile` is then the next.
template <Form form, int R> void filter_tiles(const Block & b, Tile & tile) {
    constexpr int   products = side<form> * side<form>;
    const Operand & o = b.operands[0];
    const int       numbers = numbers_of(o.length);
    const int64_t   step = int64_t{R} * numbers;
    auto *          sums = static_cast<float *>(b.scratch);
    auto *          inputs = reinterpret_cast<Number *>(sums + products * R * panel);
    Tile            tiles[R];
    ResultRows      rows[R];
    for (int i = 0; i < R; ++i, advance(o.rows, tile)) {
        tiles[i] = tile;
        rows[i].set(o.rows, tile);
    }
    o.rows.bf16 ? filter_inputs<form, Element::bf16>(o, tiles, inputs, numbers, step)
                : filter_inputs<form, Element::f32>(o, tiles, inputs, numbers, step);
    Tile next = tile;
    for (int i = 0; i < R && first_row(o.rows, next) < b.end_row; ++i, advance(o.rows, next)) {
        expect_inputs<form>(o, next);
    }
    each_panel(b, [&](auto vectors_there, int number, int column) {
        constexpr int V = decltype(vectors_there)::value;
        for (const ResultRows & of_tile : rows) {
            for (const int64_t row : of_tile.at) {
                if (row >= 0) {
                    expect_tile(b, row, 1, column);
                }
            }
        }
        const Number * weights = static_cast<const Number *>(o.panels) + int64_t{number} * products * numbers * panel;
        for (int i = 0; i < products; ++i, weights += int64_t{numbers} * panel) {
            multiply_evenly<R, V>(inputs + i * step, numbers, numbers, weights, panel, sums + i * R * panel, panel, false);
        }
        for (int i = 0; i < R; ++i) {
            if (b.columns - column >= V * lanes) {
                filter_results<form, true>(b, rows[i], sums + i * panel, R * panel, column, V);
            } else {
                filter_results<form, false>(b, rows[i], sums + i * panel, R * panel, column, V);
            }
        }
    });
}

template <Form form> void filter(const Block & b) {
    const Rows & r = b.operands[0].rows;
    Tile         tile = tile_at(r, b.first_row);
    int64_t      left = tiles_before(r, b.end_row) - tiles_before(r, b.first_row);
    for (; left >= tile_rows; left -= tile_rows) {
        filter_tiles<form, tile_rows>(b, tile);
    }
    for (; left >= 2; left -= 2) {
        filter_tiles<form, 2>(b, tile);
    }
    if (left > 0) {
        filter_tiles<form, 1>(b, tile);
    }
}

// ---- of either form ------------------------------------------------------------------------------------------

void pack(const Pack & p) {
    switch (p.form) {
        case Form::direct: return pack_taps(p);
        case Form::winograd: return pack_filter<Form::winograd>(p);
        case Form::winograd_doubled: return pack_filter<Form::winograd_doubled>(p);
    }
}

void product(const Block & b) {
    switch (b.operands[0].form) {
        case Form::direct: return product_of_rows(b);
        case Form::winograd: return filter<Form::winograd>(b);
        case Form::winograd_doubled: return filter<Form::winograd_doubled>(b);
    }
}

int64_t row_scratch(Form form, int taps, int length) {
    return form == Form::direct ? scratch_of_rows(form, taps, length)
                                : int64_t{products_of(form, taps)} * tile_rows *
                                      (int64_t{sizeof(float)} * panel + int64_t{sizeof(Number)} * numbers_of(length));
}
