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

#ifdef SD_BF16
void pack_taps(const Pack & p) {
    const int padded = numbers_of(p.length) * channels_of_number;
    for (int tap = 0; tap < p.taps; ++tap) {
        for (int channel = p.length; channel < padded; ++channel) {
            store(p.scratch + (static_cast<int64_t>(tap) * padded + channel) * lanes, Vec{});
        }
    }
    transpose_any(p, p.scratch, lanes, padded);
    Number * to = static_cast<Number *>(p.to) + p.column;
    for (int pair = 0; pair < p.taps * padded / 2; ++pair) {
        store_pair(to + static_cast<int64_t>(pair) * panel, load(p.scratch + 2 * pair * lanes),
                   load(p.scratch + (2 * pair + 1) * lanes));
    }
}
#else
void pack_taps(const Pack & p) { transpose_any(p, static_cast<float *>(p.to) + p.column, panel, p.length); }
#endif
