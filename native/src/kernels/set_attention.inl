// softmax(q k^T scale + mask) v; part of set.inl. Scores of a few queries and keys at a time stay in the cache, and sums
// are scaled down whenever a larger score turns up (Milakov and Gimelshein, 2018; Dao et al., 2022).

constexpr int query_block = 96; // whole numbers of `attended` of every set
constexpr int key_step = lanes > channel_step ? lanes : channel_step; // scores are there for whole steps of keys

template <int n> struct Columns {
    static constexpr int vectors = n;
};

struct HeadScratch {
    Number *keys, *values, *queries, *chances;
    float * scores, *sums, *most, *total, *packing;
    int64_t bytes;

    HeadScratch(void * at, int64_t n, int size) {
        const int64_t padded = up_to(n, panel), width = up_to(size, lanes), channels = up_to(size, channel_step);
        int64_t       used = 0;
        const auto    take = [&](auto *& part, int64_t count) {
            part = reinterpret_cast<std::remove_reference_t<decltype(part)>>(static_cast<char *>(at) + used);
            used += up_to(count * int64_t{sizeof *part}, 64);
        };
        take(keys, padded * numbers_of(size));
        take(values, padded / channels_of_number * width);
        take(queries, int64_t{query_block} * numbers_of(size));
        take(scores, attended * key_block);
        take(sums, query_block * width);
        take(most, query_block);
        take(total, query_block * lanes);
        take(packing, lanes * channels);
        if (products_in_bf16) {
            take(chances, attended * key_block / channels_of_number);
        } else {
            chances = reinterpret_cast<Number *>(scores);
        }
        bytes = used;
    }
};

int64_t head_scratch(int64_t keys, int size) { return HeadScratch(nullptr, keys, size).bytes; }

void pack_keys(const Head & h, const HeadScratch & s) {
    const int64_t width = up_to(h.size, lanes);
    for (int64_t first = 0; first < h.keys; first += panel) {
        for (int v = 0; v < vectors; ++v) {
            const int64_t key = first + v * lanes, left = h.keys - key;
            char * const  to = reinterpret_cast<char *>(s.keys) + first / panel * panel_bytes(Form::direct, 1, h.size);
            const int     there = static_cast<int>(left < 0 ? 0 : left < lanes ? left : lanes);
            pack_taps({Form::direct, h.k + key * h.k_row, Element::f32, h.k_row, there, 1, h.size, to, v * lanes, s.packing});
        }
    }
    const auto value = [&](int64_t key, int at) {
        return key < h.keys ? load_upto(h.v + key * h.v_row + at, h.size - at) : Vec{};
    };
    for (int64_t key = 0; key < up_to(h.keys, panel); key += channels_of_number) {
        for (int at = 0; at < width; at += lanes) {
            Number * to = s.values + key / channels_of_number * width + at;
#ifdef SD_BF16
            store_pair(to, value(key, at), value(key + 1, at));
#else
            store(to, value(key, at));
#endif
        }
    }
}

// `count` queries, scaled so that scores are powers of 2.
void take_queries(const Head & h, const HeadScratch & s, int64_t first, int count) {
    const int numbers = numbers_of(h.size);
    std::memset(s.queries, 0, sizeof(Number) * static_cast<size_t>(up_to(count, attended) * numbers));
    for (int i = 0; i < count; ++i) {
        const float * q = h.q + (first + i) * h.q_row;
#ifdef SD_BF16
        float * scaled = s.packing;
#else
        float * scaled = s.queries + int64_t{i} * numbers;
#endif
        for (int at = 0; at < h.size; ++at) {
            scaled[at] = q[at] * (h.scale * log2_of_e);
        }
#ifdef SD_BF16
        round_row(scaled, reinterpret_cast<uint16_t *>(s.queries + int64_t{i} * numbers), h.size);
#endif
    }
}

constexpr float nothing = -1e30f; // the score of what is not to be seen: finite, so that differences are

template <int R> SD_INLINE void score(const Head & h, const HeadScratch & s, int64_t query, int at, int64_t key, int keys) {
    const int      numbers = numbers_of(h.size);
    const Number * queries = s.queries + int64_t{at} * numbers;
    for (int first = 0; first < keys; first += panel) {
        multiply_evenly<R, vectors>(queries, numbers, numbers, s.keys + (key + first) * numbers, panel, s.scores + first, key_block, false);
    }
    for (int r = 0; r < R; ++r) {
        float * scores = s.scores + r * key_block;
        if (h.mask && query + at + r < h.end_query) {
            const float * mask = h.mask + (query + at + r) * h.mask_row + key;
            for (int i = 0; i < keys; ++i) {
                const float sum = scores[i] + mask[i] * log2_of_e;
                scores[i] = sum > nothing ? sum : nothing;
            }
        }
        for (int i = keys; i < up_to(keys, key_step); ++i) {
            scores[i] = nothing;
        }
    }
}

// Scores of R queries, the first of which is number `at` of the block and `row` of those scored, become chances.
template <int R> SD_INLINE void soften(const HeadScratch & s, int64_t width, int at, int row, int keys) {
    float * const scores = s.scores + row * key_block;
    auto * const  chances = s.chances + row * key_block / channels_of_number;
    Vec           most[R], total[R];
    for (int r = 0; r < R; ++r) {
        most[r] = splat(s.most[at + r]);
        total[r] = Vec{};
    }
    for (int i = 0; i < keys; i += lanes) { // all rows at once, whose chains of results do not wait for each other
        for (int r = 0; r < R; ++r) {
            most[r] = larger(most[r], load(scores + r * key_block + i));
        }
    }
    for (int r = 0; r < R; ++r) {
        most[r] = largest_of(most[r]);
    }
    for (int i = 0; i < up_to(keys, key_step); i += lanes) {
        for (int r = 0; r < R; ++r) {
            const Vec p = exp2_of(load(scores + r * key_block + i) - most[r]);
            total[r] += p;
#ifdef SD_BF16
            store_bf16_upto(reinterpret_cast<uint16_t *>(chances) + r * key_block + i, p, lanes);
#else
            store(chances + r * key_block + i, p);
#endif
        }
    }
    float * sums = s.sums + at * width;
    for (int r = 0; r < R; ++r) {
        const float top = most[r][0];
        float *     whole = s.total + (at + r) * lanes;
        if (top > s.most[at + r]) {
            const Vec fade = exp2_of(splat(s.most[at + r] - top));
            for (int64_t i = 0; i < width; i += lanes) {
                store(sums + r * width + i, load(sums + r * width + i) * fade);
            }
            s.most[at + r] = top;
            store(whole, load(whole) * fade);
        }
        store(whole, load(whole) + total[r]);
    }
}

// R queries, beginning with number `at` of the block, see `keys` keys.
template <int R> void attend(const Head & h, const HeadScratch & s, int64_t query, int at, int64_t key, int keys) {
    score<R>(h, s, query, at, key, keys);
    const int64_t width = up_to(h.size, lanes);
    constexpr int at_once = R < softened ? R : softened;
    static_assert(R % at_once == 0);
    for (int row = 0; row < R; row += at_once) {
        soften<at_once>(s, width, at + row, row, keys);
    }
    float * sums = s.sums + at * width;
    const auto columns = [&](auto some, int64_t first) {
        multiply_evenly<R, decltype(some)::vectors>(s.chances, key_block / channels_of_number, numbers_of(keys),
                                                    s.values + key / channels_of_number * width + first, width, sums + first,
                                                    width, true);
    };
    for (int64_t first = 0; first < width;) {
        const int64_t left = (width - first) / lanes;
        if (left >= vectors && left != vectors + 1) {
            columns(Columns<vectors>{}, first);
            first += vectors * lanes;
        } else if (left == 1) {
            columns(Columns<1>{}, first);
            first += lanes;
        } else if (left == 2 || vectors == 2) {
            columns(Columns<2>{}, first);
            first += 2 * lanes;
        } else { // 3, and 5 as 3 and 2
            columns(Columns<vectors == 4 ? 3 : 2>{}, first);
            first += 3 * lanes;
        }
    }
}

void attention(const Head & h) {
    const Multiplier  multiplier;
    const HeadScratch s(h.scratch, h.keys, h.size);
    const int64_t     width = up_to(h.size, lanes);
    pack_keys(h, s);
    for (int64_t query = h.first_query; query < h.end_query; query += query_block) {
        const int queries = static_cast<int>(h.end_query - query < query_block ? h.end_query - query : query_block);
        take_queries(h, s, query, queries);
        for (int i = 0; i < query_block; ++i) {
            s.most[i] = nothing;
            store(s.total + i * lanes, Vec{});
        }
        std::memset(s.sums, 0, sizeof(float) * static_cast<size_t>(query_block * width));
        for (int64_t key = 0; key < h.keys; key += key_block) {
            const int keys = static_cast<int>(h.keys - key < key_block ? h.keys - key : key_block);
            int       at = 0;
            for (; at + attended <= queries; at += attended) {
                attend<attended>(h, s, query, at, key, keys);
            }
#ifdef SD_AMX
            if (at < queries) { // rows of zeros fill up a tile
                attend<attended>(h, s, query, at, key, keys);
            }
#else
            for (; at < queries; ++at) {
                attend<1>(h, s, query, at, key, keys);
            }
#endif
        }
        for (int i = 0; i < queries; ++i) {
            const Vec total = sum_of(load(s.total + i * lanes));
            for (int at = 0; at < h.size; at += lanes) {
                put(h.out, (query + i) * h.out_row + h.out_column + at, load(s.sums + i * width + at) / total, h.size - at);
            }
        }
    }
}
