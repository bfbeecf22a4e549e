// Weights as products want them; part of set.inl. A panel holds, for one number of channels after the other, those of
// `panel` columns side by side.

int64_t panel_bytes(Form form, int taps, int length) {
    return int64_t{sizeof(Number)} * panel * products_of(form, taps) * numbers_of(length);
}

template <Element element> SD_INLINE Vec load_element(const void * from, int64_t at, int n) {
    if constexpr (element == Element::f32) {
        return load_upto(static_cast<const float *>(from) + at, n);
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

#ifndef SD_AMX
// Element j = channel * taps + tap of a weight's row goes to row tap * padded + channel of the panel.
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
#endif

#ifdef SD_BF16
// Pairs of neighbouring elements, of twice as many as a vector has lanes, rounded to bf16.
template <Element element> SD_INLINE Vec load_pairs(const void * from, int64_t at, int n) {
    const Vec low = load_element<element>(from, at, n);
    const Vec high = n > lanes ? load_element<element>(from, at + lanes, n - lanes) : Vec{};
    return (Vec) _mm512_cvtne2ps_pbh((__m512) high, (__m512) low);
}

// Elements 2 m and 2 m + 1 of a weight's row, of n, go to row m of `to`.
template <Element element> void transpose_pairs(const Pack & p, int n, Number * to, int64_t stride) {
    for (int j = 0; j < n; j += 2 * lanes) {
        Vec rows[lanes];
        for (int i = 0; i < lanes; ++i) {
            rows[i] = i < p.rows ? load_pairs<element>(p.from, i * p.row + j, n - j) : Vec{};
        }
        transpose(rows);
        const int some = n - j < 2 * lanes ? (n - j + 1) / 2 : lanes;
        for (int i = 0; i < some; ++i, to += stride) {
            store(reinterpret_cast<float *>(to), rows[i]);
        }
    }
}

void transpose_any_pairs(const Pack & p, int n, Number * to, int64_t stride) {
    switch (p.element) {
        case Element::f32: return transpose_pairs<Element::f32>(p, n, to, stride);
        case Element::f16: return transpose_pairs<Element::f16>(p, n, to, stride);
        case Element::bf16: return transpose_pairs<Element::bf16>(p, n, to, stride);
    }
}

// The columns' element `at` out of pairs of them, in the lower or in the upper half.
SD_INLINE UVec lower_half(const Number * pairs, int at) {
    const UVec pair = (UVec) load(reinterpret_cast<const float *>(pairs + at / 2 * lanes));
    return at % 2 == 0 ? pair & 0xffffu : pair >> 16;
}
SD_INLINE UVec upper_half(const Number * pairs, int at) {
    const UVec pair = (UVec) load(reinterpret_cast<const float *>(pairs + at / 2 * lanes));
    return at % 2 == 0 ? pair << 16 : pair & 0xffff0000u;
}

// A number has the same tap of two channels, which lie `taps` elements apart: pairs of neighbours are transposed, of so
// few channels at a time that they stay in the first-level cache, and joined anew.
void pack_taps(const Pack & p) {
    const int numbers = numbers_of(p.length);
    auto *    to = static_cast<Number *>(p.to) + p.column;
    auto *    pairs = reinterpret_cast<Number *>(p.scratch);
    Pack      some = p;
    for (int first = 0; first < p.length; first += 2 * lanes) {
        some.length = p.length - first < 2 * lanes ? p.length - first : 2 * lanes;
        const int     n = p.taps * some.length;
        Number *      at = to + int64_t{first / 2} * panel;
        if (p.taps == 1) {
            transpose_any_pairs(some, n, at, panel);
        } else {
            transpose_any_pairs(some, n, pairs, lanes);
            for (int channel = 0; channel < some.length; channel += 2, at += panel) {
                for (int tap = 0; tap < p.taps; ++tap) {
                    const int element = channel * p.taps + tap;
                    UVec      number = lower_half(pairs, element);
                    if (channel + 1 < some.length) {
                        number |= upper_half(pairs, element + p.taps);
                    }
                    store(reinterpret_cast<float *>(at + int64_t{tap} * numbers * panel), (Vec) number);
                }
            }
        }
        some.from = static_cast<const char *>(some.from) + int64_t{2} * lanes * p.taps * (p.element == Element::f32 ? 4 : 2);
    }
    for (int tap = 0; tap < p.taps; ++tap) {
        for (int number = (p.length + 1) / 2; number < numbers; ++number) {
            store(reinterpret_cast<float *>(to + (int64_t{tap} * numbers + number) * panel), Vec{});
        }
    }
}
#else
void pack_taps(const Pack & p) { transpose_any(p, static_cast<float *>(p.to) + p.column, panel, p.length); }
#endif
