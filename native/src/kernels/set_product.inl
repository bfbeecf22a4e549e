// Products with weights; part of set.inl.

// Asks for what a tile will read and write, which arrives while it is multiplied.
SD_INLINE void expect_tile(const Block & b, int64_t row, int count, int column) {
    const int64_t size = b.y.bf16 ? 2 : 4, from = b.y_column + column;
    const int     columns = b.columns - column < panel ? b.columns - column : panel;
    for (int r = 0; r < count; ++r) {
        const char * y = static_cast<const char *>(b.y.data) + ((row + r) * b.y_row + from) * size;
        for (int64_t byte = 0; byte < columns * size; byte += 64) {
            __builtin_prefetch(y + byte, 1);
        }
        if (b.last && b.epilogue->residual) {
            const float * residual = b.epilogue->residual + (row + r) * b.epilogue->residual_row + column;
            for (int at = 0; at < columns; at += 16) {
                __builtin_prefetch(residual + at);
            }
        }
    }
}

// What becomes of the sums of a panel. It holds copies: a store through y might change the block, for all that a compiler
// knows, which would read it anew for every vector.
class Writer {
  public:
    struct Row {
        int64_t       at; // its first sum of the panel in y
        const float * scale, *shift, *residual;
    };

    Writer(const Block & b, int column)
        : y_(b.y), e_(*b.epilogue), y_row_(b.y_row), y_column_(b.y_column + column), column_(column), first_(b.first),
          last_(b.last) {}

    __attribute__((always_inline)) Row row(int64_t row) const {
        const auto    from = [&](const float * x, int64_t at) { return x ? x + at + column_ : nullptr; };
        const int64_t image = e_.scale || e_.shift ? row / e_.rows_per_image : 0;
        return {row * y_row_ + y_column_, from(e_.scale, image * e_.scale_image), from(e_.shift, image * e_.shift_image),
                from(e_.residual, row * e_.residual_row)};
    }

    // The first n of a vector of sums, `column` further in the panel.
    __attribute__((always_inline)) void write(const Row & row, Vec sum, int column, int n) const {
        if (!first_) {
            sum += load_upto(static_cast<const float *>(y_.data) + row.at + column, n);
        }
        if (last_) {
            if (e_.bias) {
                sum += load_upto(e_.bias + column_ + column, n);
            }
            sum = activated(sum, e_.activation);
            if (row.scale) {
                sum *= load_upto(row.scale + column, n);
            }
            if (row.shift) {
                sum += load_upto(row.shift + column, n);
            }
            if (row.residual) {
                sum += load_upto(row.residual + column, n);
            }
        }
        put(y_, row.at + column, sum, n);
    }

  private:
    const Activations y_;
    const Epilogue    e_;
    const int64_t     y_row_, y_column_;
    const int         column_;
    const bool        first_, last_;
};

// Some vectors of one panel, all columns of which there are, or not.
template <bool whole> SD_INLINE void write_tile(const Block & b, const float * total, int64_t row, int count, int column, int some) {
    const Writer writer(b, column);
    for (int r = 0; r < count; ++r) {
        const Writer::Row at = writer.row(row + r);
        for (int v = 0; v < some; ++v) {
            const int n = whole ? lanes : b.columns - column - v * lanes;
            writer.write(at, load(total + r * panel + v * lanes), v * lanes, n);
        }
    }
}

// Calls use(its vectors that there are, its number, its first column) for every panel, the vectors as a constant.
template <typename Use> SD_INLINE void each_panel(const Block & b, const Use & use) {
    for (int column = 0, number = 0; column < b.columns; column += panel, ++number) {
        const int left = (b.columns - column + lanes - 1) / lanes;
        if (left >= vectors) {
            use(std::integral_constant<int, vectors>{}, number, column);
        } else if (left == 1) {
            use(std::integral_constant<int, 1>{}, number, column);
        } else if constexpr (vectors == 4) { // 2 or 3
            left == 2 ? use(std::integral_constant<int, 2>{}, number, column)
                      : use(std::integral_constant<int, 3>{}, number, column);
        }
    }
}

template <int R, int V> void product_tile(const Block & b, int64_t row, int count, const RowTile<R> & rows, int number, int column) {
    alignas(64) float total[R * panel];
    expect_tile(b, row, count, column);
    rows.template multiply_with<V>(b, number, total);
    if (b.columns - column >= V * lanes) {
        write_tile<true>(b, total, row, count, column, V);
    } else {
        write_tile<false>(b, total, row, count, column, V);
    }
}

// A panel of values and the panel of their gates: y = (value + bias) gelu(gate + gate bias).
template <int R> void gated_tile(const Block & b, int64_t row, int count, const RowTile<R> & rows, int number, int column) {
    alignas(64) float total[2][R * panel];
    expect_tile(b, row, count, column);
    for (int half = 0; half < 2; ++half) {
        rows.template multiply_with<vectors>(b, 2 * number + half, total[half]);
    }
    for (int r = 0; r < count; ++r) {
        for (int v = 0; v < vectors; ++v) {
            const int at = column + v * lanes, n = b.columns - at;
            if (n <= 0) {
                break;
            }
            Vec value = load(total[0] + r * panel + v * lanes), gate = load(total[1] + r * panel + v * lanes);
            if (b.epilogue->bias) {
                value += load_upto(b.epilogue->bias + at, n);
                gate += load_upto(b.epilogue->gate_bias + at, n);
            }
            put(b.y, (row + r) * b.y_row + b.y_column + at, value * gelu_of(gate), n);
        }
    }
}

// `count` rows, at most R, against all panels.
template <int R> void row_tile(const Block & b, int64_t row, int count) {
    const RowTile<R> rows(b, row, count);
    if (b.epilogue->activation == Activation::geglu) {
        for (int column = 0, number = 0; column < b.columns; column += panel, ++number) {
            gated_tile<R>(b, row, count, rows, number, column);
        }
        return;
    }
    each_panel(b, [&](auto vectors_there, int number, int column) __attribute__((always_inline)) {
        product_tile<R, decltype(vectors_there)::value>(b, row, count, rows, number, column);
    });
}

void product_of_rows(const Block & b) {
    const Multiplier multiplier;
    int64_t          row = b.first_row;
    for (; row + tile_rows <= b.end_row; row += tile_rows) {
        row_tile<tile_rows>(b, row, tile_rows);
    }
#ifdef SD_AMX
    const int left = static_cast<int>(b.end_row - row);
    if (left > tile_rows / 2) {
        row_tile<tile_rows>(b, row, left);
    } else if (left > 0) {
        row_tile<tile_rows / 2>(b, row, left);
    }
#else
    for (; row + 2 <= b.end_row; row += 2) {
        row_tile<2>(b, row, 2);
    }
    if (row < b.end_row) {
        row_tile<1>(b, row, 1);
    }
#endif
}
