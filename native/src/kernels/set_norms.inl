// Norms and what works element by element; part of set.inl.

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
