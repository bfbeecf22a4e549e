// The left operands of products; part of set.inl.

// A bf16 set's from floats as well.
SD_INLINE void copy_numbers(const void * from, [[maybe_unused]] bool bf16, int channels, Number * to) {
#ifdef SD_BF16
    if (!bf16) {
        return round_row(static_cast<const float *>(from), reinterpret_cast<uint16_t *>(to), channels);
    }
#endif
    std::memcpy(to, from, sizeof(Number) * static_cast<size_t>(channels) / channels_of_number);
}

SD_INLINE bool is_plain(const Rows & r) {
    return r.taps_w * r.taps_h == 1 && r.stride == 1 && r.pad == 0 && r.seen_width == r.width && r.seen_height == r.height;
}

// Where in x, of `there` pixels, the pixel `at` of `seen` lies along an axis; -1 outside.
SD_INLINE int source_at(int at, int seen, int there) {
    return at < 0 || at >= seen ? -1 : seen == there ? at : static_cast<int>(static_cast<int64_t>(at) * there / seen);
}

// Calls use(i, tap, where its channels begin) for `count` consecutive rows, one per output pixel; null where a tap lies
// outside of the picture.
template <typename Use> SD_INLINE void each_tap(const Rows & r, int64_t row, int count, int c0, const Use & use) {
    const int64_t size = r.bf16 ? 2 : 4;
    const auto *  x = static_cast<const char *>(r.x) + c0 * size;
    const int64_t line = row / r.out_width;
    int64_t       image = line / r.out_height;
    int           out_x = static_cast<int>(row % r.out_width), out_y = static_cast<int>(line % r.out_height);
    for (int i = 0; i < count; ++i) {
        const int left = out_x * r.stride - r.pad, top = out_y * r.stride - r.pad;
        for (int dy = 0, tap = 0; dy < r.taps_h; ++dy) {
            const int down = source_at(top + dy, r.seen_height, r.height);
            for (int dx = 0; dx < r.taps_w; ++dx, ++tap) {
                const int across = source_at(left + dx, r.seen_width, r.width);
                if (down < 0 || across < 0) {
                    use(i, tap, static_cast<const void *>(nullptr));
                    continue;
                }
                const int64_t pixel = image * r.image + (static_cast<int64_t>(down) * r.width + across) * r.pixel;
                use(i, tap, static_cast<const void *>(x + pixel * size));
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
