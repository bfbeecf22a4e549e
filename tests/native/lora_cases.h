// Modules of every kind with random factors, and what each makes of a weight: plain loops in double, written
// from the formulas of lora-formats.md and from nothing else.
#pragma once

#include "lora/lora_formats.h"

#include <cmath>
#include <functional>
#include <random>
#include <string>
#include <vector>

namespace sd::test {

using Doubles = std::vector<double>;

inline std::vector<float> random_floats(std::mt19937 & rng, size_t n, float spread) {
    std::normal_distribution<float> normal(0.0f, spread);
    std::vector<float> out(n);
    for (float & value : out) {
        value = normal(rng);
    }
    return out;
}

// A module, and W' of its rows at a multiplier.
struct LoraCase {
    std::string name;
    LoraModule module;
    std::function<Doubles(const Doubles & w, double)> changed;
};

// rows x inputs x taps; taps is 1 or kernel * kernel.
class LoraCases {
  public:
    LoraCases(const LoraTarget & target, int64_t rows, int64_t inputs, int64_t kernel, uint32_t seed)
        : target_(target), d_{rows, inputs, kernel * kernel}, k_(kernel), rng_(seed) {}

    LoraCase low_rank(int64_t r, double scale = 0.75) {
        const Sizes d = d_;
        LoraModule m = begin(LoraKind::low_rank, scale);
        put(m, "down", shape({r, d.i}));
        put(m, "up", {d.o, r});
        return additive("low_rank", m, [=](const LoraModule & f, int64_t o, int64_t i, int64_t t) {
            double sum = 0;
            for (int64_t p = 0; p < r; ++p) {
                sum += at(f, "up", o * r + p) * at(f, "down", (p * d.i + i) * d.t + t);
            }
            return scale * sum;
        });
    }

    LoraCase tucker(int64_t p, int64_t q) {
        const Sizes d = d_;
        LoraModule m = begin(LoraKind::low_rank, 1.5);
        put(m, "down", {q, d.i});
        put(m, "mid", shape({p, q}));
        put(m, "up", {d.o, p});
        return additive("tucker", m, [=](const LoraModule & f, int64_t o, int64_t i, int64_t t) {
            double sum = 0;
            for (int64_t a = 0; a < p; ++a) {
                for (int64_t b = 0; b < q; ++b) {
                    sum += at(f, "up", o * p + a) * at(f, "mid", (a * q + b) * d.t + t) *
                           at(f, "down", b * d.i + i);
                }
            }
            return 1.5 * sum;
        });
    }

    LoraCase loha(int64_t r, bool with_core) {
        const Sizes d = d_;
        LoraModule m = begin(LoraKind::loha, 0.5);
        for (const std::string w : {"1", "2"}) {
            put(m, "w" + w + "_a", with_core ? std::vector<int64_t>{r, d.o} : std::vector<int64_t>{d.o, r});
            put(m, "w" + w + "_b", {r, with_core ? d.i : d.i * d.t});
            if (with_core) {
                put(m, "t" + w, shape({r, r}));
            }
        }
        return additive(with_core ? "loha tucker" : "loha", m,
                        [=](const LoraModule & f, int64_t o, int64_t i, int64_t t) {
                            double product = 0.5;
                            for (const std::string w : {"1", "2"}) {
                                double sum = 0;
                                for (int64_t a = 0; a < r; ++a) {
                                    if (!with_core) {
                                        sum += at(f, "w" + w + "_a", o * r + a) *
                                               at(f, "w" + w + "_b", (a * d.i + i) * d.t + t);
                                    }
                                    for (int64_t b = 0; b < r && with_core; ++b) {
                                        sum += at(f, "t" + w, (a * r + b) * d.t + t) *
                                               at(f, "w" + w + "_a", a * d.o + o) *
                                               at(f, "w" + w + "_b", b * d.i + i);
                                    }
                                }
                                product *= sum;
                            }
                            return product;
                        });
    }

    // `decomposed` 0: both whole, 1: w2 as a product, 2: both, 3: w2 with a core.
    LoraCase lokr(int64_t o1, int64_t i1, int decomposed, int64_t r = 2) {
        const Sizes d = d_;
        const int64_t o2 = d.o / o1, i2 = d.i / i1;
        LoraModule m = begin(LoraKind::lokr, 0.5);
        if (decomposed == 2) {
            put(m, "w1_a", {o1, r});
            put(m, "w1_b", {r, i1});
        } else {
            put(m, "w1", {o1, i1});
        }
        if (decomposed == 0) {
            put(m, "w2", shape({o2, i2}));
        } else if (decomposed == 3) {
            put(m, "t2", shape({r, r}));
            put(m, "w2_a", {r, o2});
            put(m, "w2_b", {r, i2});
        } else {
            put(m, "w2_a", {o2, r});
            put(m, "w2_b", {r, i2 * d.t});
        }
        return additive("lokr " + std::to_string(decomposed), m,
                        [=](const LoraModule & f, int64_t o, int64_t i, int64_t t) {
                            const int64_t a = o / o2, c = o % o2, b = i / i2, l = i % i2;
                            double w1 = 0, w2 = 0;
                            for (int64_t p = 0; p < r; ++p) {
                                w1 += decomposed == 2 ? at(f, "w1_a", a * r + p) * at(f, "w1_b", p * i1 + b)
                                                      : 0;
                                w2 += decomposed == 1 || decomposed == 2
                                          ? at(f, "w2_a", c * r + p) * at(f, "w2_b", (p * i2 + l) * d.t + t)
                                          : 0;
                                for (int64_t q = 0; q < r && decomposed == 3; ++q) {
                                    w2 += at(f, "t2", (p * r + q) * d.t + t) * at(f, "w2_a", p * o2 + c) *
                                          at(f, "w2_b", q * i2 + l);
                                }
                            }
                            w1 = decomposed == 2 ? w1 : at(f, "w1", a * i1 + b);
                            w2 = decomposed == 0 ? at(f, "w2", (c * i2 + l) * d.t + t) : w2;
                            return 0.5 * w1 * w2;
                        });
    }

    LoraCase dense() {
        const Sizes d = d_;
        LoraModule m = begin(LoraKind::dense, 1);
        put(m, "diff", shape({d.o, d.i}));
        return additive("dense", m, [=](const LoraModule & f, int64_t o, int64_t i, int64_t t) {
            return at(f, "diff", (o * d.i + i) * d.t + t);
        });
    }

    LoraCase replace() {
        const Sizes d = d_;
        LoraModule m = begin(LoraKind::replace, 1);
        put(m, "diff", shape({d.o, d.i}));
        return {"replace", m, [m](const Doubles & w, double x) {
                    Doubles out = w;
                    for (size_t e = 0; e < w.size(); ++e) {
                        out[e] += x * (at(m, "diff", static_cast<int64_t>(e)) - w[e]);
                    }
                    return out;
                }};
    }

    LoraCase ia3(bool on_input) {
        const Sizes d = d_;
        LoraModule m = begin(LoraKind::ia3, 1);
        m.on_input = on_input;
        put(m, "weight", {on_input ? d.i : d.o});
        return {on_input ? "ia3 inputs" : "ia3 outputs", m, [=](const Doubles & w, double x) {
                    Doubles out = w;
                    for (int64_t e = 0; e < d.o * d.i * d.t; ++e) {
                        out[e] *= 1 + x * at(m, "weight", on_input ? e / d.t % d.i : e / d.t / d.i);
                    }
                    return out;
                }};
    }

    LoraCase glora(int64_t r, bool with_core = false) {
        const Sizes d = d_;
        LoraModule m = begin(LoraKind::glora, 0.5);
        put(m, "a1", {d.i, r});
        put(m, "a2", {r, d.i});
        put(m, "b1", {d.o, r});
        put(m, "b2", with_core ? std::vector<int64_t>{r, d.i} : shape({r, d.i}));
        if (with_core) {
            put(m, "bm", shape({r, r}));
        }
        return {with_core ? "glora tucker" : "glora", m, [=](const Doubles & w, double x) {
                    Doubles out = w;
                    for (int64_t o = 0; o < d.o; ++o) {
                        for (int64_t i = 0; i < d.i; ++i) {
                            for (int64_t t = 0; t < d.t; ++t) {
                                double sum = 0;
                                for (int64_t p = 0; p < r; ++p) {
                                    double w_a1 = 0;
                                    for (int64_t j = 0; j < d.i; ++j) {
                                        w_a1 += w[(o * d.i + j) * d.t + t] * at(m, "a1", j * r + p);
                                    }
                                    double b2 = 0;
                                    for (int64_t q = 0; q < r && with_core; ++q) {
                                        b2 += at(m, "bm", (p * r + q) * d.t + t) * at(m, "b2", q * d.i + i);
                                    }
                                    b2 = with_core ? b2 : at(m, "b2", (p * d.i + i) * d.t + t);
                                    sum += w_a1 * at(m, "a2", p * d.i + i) + at(m, "b1", o * r + p) * b2;
                                }
                                out[(o * d.i + i) * d.t + t] += x * 0.5 * sum;
                            }
                        }
                    }
                    return out;
                }};
    }

    // The former with its rows, or inputs, brought to magnitudes.
    LoraCase dora(LoraCase of, bool of_columns) {
        const Sizes d = d_;
        LoraModule m = of.module;
        const auto n = static_cast<size_t>(of_columns ? d.i : d.o);
        const auto norms = random_floats(rng_, n, 0.3f);
        m.magnitude_of_columns = of_columns;
        m.magnitude = Factor{{static_cast<int64_t>(n)}, norms};
        return {of.name + (of_columns ? " dora inputs" : " dora outputs"), m,
                [=](const Doubles & w, double x) {
                    const Doubles v = of.changed(w, 1);
                    Doubles out = w;
                    for (int64_t e = 0; e < d.o * d.i * d.t; ++e) {
                        const auto index = [&](int64_t of_e) {
                            return of_columns ? of_e / d.t % d.i : of_e / d.t / d.i;
                        };
                        double square = 0;
                        for (int64_t other = 0; other < d.o * d.i * d.t; ++other) {
                            square += index(other) == index(e) ? v[other] * v[other] : 0;
                        }
                        out[e] += x * (norms[index(e)] * v[e] / std::sqrt(square) - w[e]);
                    }
                    return out;
                }};
    }

    LoraCase oft(int64_t b, double constraint, bool with_rescale) {
        const Sizes d = d_;
        const int64_t n = d.o / b;
        LoraModule m = begin(LoraKind::oft, 1);
        put(m, "blocks", {n, b, b});
        m.constraint = constraint > 0 ? std::optional<double>(constraint) : std::nullopt;
        if (with_rescale) {
            put(m, "rescale", {d.o});
        }
        return {with_rescale     ? "oft with rescale"
                : constraint > 0 ? "oft with constraint"
                                 : "oft",
                m, [=](const Doubles & w, double x) {
                    const std::vector<Doubles> r = rotations(m, n, b, constraint);
                    Doubles out = w;
                    for (int64_t o = 0; o < d.o; ++o) {
                        for (int64_t c = 0; c < d.i * d.t; ++c) {
                            double turned = 0;
                            for (int64_t p = 0; p < b; ++p) {
                                turned += r[o / b][p * b + o % b] * w[(o / b * b + p) * d.i * d.t + c];
                            }
                            turned *= with_rescale ? at(m, "rescale", o) : 1;
                            out[o * d.i * d.t + c] += x * (turned - w[o * d.i * d.t + c]);
                        }
                    }
                    return out;
                }};
    }

    LoraCase boft(int64_t stages, int64_t b) {
        const Sizes d = d_;
        const int64_t n = d.o / b;
        LoraModule m = begin(LoraKind::boft, 1);
        put(m, "blocks", {stages, n, b, b});
        put(m, "rescale", {d.o});
        return {"boft", m, [=](const Doubles & w, double x) {
                    const std::vector<Doubles> r = rotations(m, stages * n, b, 0);
                    Doubles out = w;
                    for (int64_t c = 0; c < d.i * d.t; ++c) {
                        for (int64_t s = 0; s < stages; ++s) {
                            const int64_t apart = b / 2 << s;
                            std::vector<int64_t>
                                order; // which row lies where: pairs of rows `apart` side by side
                            for (int64_t first = 0; first < d.o; first += 2 * apart) {
                                for (int64_t k = 0; k < apart; ++k) {
                                    order.push_back(first + k);
                                    order.push_back(first + apart + k);
                                }
                            }
                            Doubles turned(static_cast<size_t>(d.o));
                            for (int64_t row = 0; row < d.o; ++row) {
                                for (int64_t p = 0; p < b; ++p) {
                                    const double part = r[s * n + row / b][row % b * b + p];
                                    turned[order[row]] += (x * part + (1 - x) * (row % b == p)) *
                                                          out[order[row / b * b + p] * d.i * d.t + c];
                                }
                            }
                            for (int64_t row = 0; row < d.o; ++row) {
                                out[row * d.i * d.t + c] = turned[row];
                            }
                        }
                        for (int64_t row = 0; row < d.o; ++row) {
                            out[row * d.i * d.t + c] *= 1 + x * (at(m, "rescale", row) - 1);
                        }
                    }
                    return out;
                }};
    }

    // PEFT: W R transposed over the inputs, R cut off after `terms` terms, or exact and the other way for 0.
    LoraCase oft_input(int64_t b, int terms) {
        const Sizes d = d_;
        const int64_t n = d.i * d.t / b, triangle = b * (b - 1) / 2;
        LoraModule m = begin(LoraKind::oft_input, 1);
        put(m, "rotation", {n, triangle});
        m.cayley_terms = terms;
        return {"oft_input " + std::to_string(terms), m, [=](const Doubles & w, double x) {
                    Doubles out = w;
                    for (int64_t k = 0; k < n; ++k) {
                        Doubles q(static_cast<size_t>(b * b));
                        int64_t next = k * triangle;
                        for (int64_t p = 0; p < b; ++p) {
                            for (int64_t s = p + 1; s < b; ++s, ++next) {
                                q[p * b + s] = at(m, "rotation", next);
                                q[s * b + p] = -at(m, "rotation", next);
                            }
                        }
                        Doubles r;
                        if (terms == 5) { // 1 + 2Q + 2Q2 + 2Q3 + Q4
                            const Doubles q2 = times(q, q, b), q3 = times(q2, q, b), q4 = times(q3, q, b);
                            r = identity(b);
                            for (size_t e = 0; e < r.size(); ++e) {
                                r[e] += 2 * q[e] + 2 * q2[e] + 2 * q3[e] + q4[e];
                            }
                        } else {
                            for (double & value : q) {
                                value = -value;
                            }
                            r = cayley_by_series(q, b);
                        }
                        for (int64_t o = 0; o < d.o; ++o) {
                            for (int64_t c = 0; c < b; ++c) {
                                double turned = 0;
                                for (int64_t p = 0; p < b; ++p) {
                                    turned += w[o * d.i * d.t + k * b + p] * r[c * b + p];
                                }
                                out[o * d.i * d.t + k * b + c] += x * (turned - w[o * d.i * d.t + k * b + c]);
                            }
                        }
                    }
                    return out;
                }};
    }

    // Every kind that suits the weight; rows and inputs are multiples of 4.
    std::vector<LoraCase> all() {
        std::vector<LoraCase> out{low_rank(1),      low_rank(3),        loha(2, false),  loha(5, false),
                                  lokr(2, 4, 0),    lokr(4, 2, 1),      lokr(2, 2, 2),   dense(),
                                  replace(),        ia3(false),         ia3(true),       glora(2),
                                  oft(4, 0, false), oft(2, 0.1, false), oft(4, 0, true), boft(2, 2),
                                  boft(1, 4),       oft_input(2, 5),    oft_input(4, 0)};
        if (k_ > 1) {
            for (LoraCase more : {tucker(3, 2), loha(2, true), lokr(2, 2, 3), glora(2, true)}) {
                out.push_back(std::move(more));
            }
        }
        for (const bool of_columns : {false, true}) {
            for (const LoraCase & of : {low_rank(2), loha(5, false), lokr(2, 2, 0), dense(), glora(1)}) {
                out.push_back(dora(of, of_columns));
            }
        }
        return out;
    }

    static double at(const LoraModule & module, const std::string & role, int64_t index) {
        return module.factors.at(role).data.at(static_cast<size_t>(index));
    }

  private:
    struct Sizes { // copied by the formulas, which outlive this
        int64_t o, i, t;
    };

    LoraModule begin(LoraKind kind, double scale) const {
        LoraModule m;
        m.stem = "module";
        m.target = target_;
        m.kind = kind;
        m.scale = scale;
        return m;
    }

    std::vector<int64_t> shape(std::vector<int64_t> of) const {
        if (k_ > 1) {
            of.push_back(k_);
            of.push_back(k_);
        }
        return of;
    }

    void put(LoraModule & m, const std::string & role, const std::vector<int64_t> & sizes) {
        int64_t n = 1;
        for (const int64_t size : sizes) {
            n *= size;
        }
        m.factors[role] = {sizes, random_floats(rng_, static_cast<size_t>(n), 0.3f)};
    }

    template <typename Element>
    LoraCase additive(const std::string & name, const LoraModule & m, Element element) const {
        const Sizes d = d_;
        return {name, m, [=](const Doubles & w, double x) {
                    Doubles out = w;
                    for (int64_t e = 0; e < d.o * d.i * d.t; ++e) {
                        out[e] += x * element(m, e / d.t / d.i, e / d.t % d.i, e % d.t);
                    }
                    return out;
                }};
    }

    static Doubles identity(int64_t b) {
        Doubles out(static_cast<size_t>(b * b));
        for (int64_t i = 0; i < b; ++i) {
            out[i * b + i] = 1;
        }
        return out;
    }

    static Doubles times(const Doubles & x, const Doubles & y, int64_t b) {
        Doubles out(static_cast<size_t>(b * b));
        for (int64_t e = 0; e < b * b * b; ++e) {
            out[e / b / b * b + e % b] += x[e / b / b * b + e / b % b] * y[e / b % b * b + e % b];
        }
        return out;
    }

    // (1 + Q)(1 - Q)^-1 by Newton's iteration for the inverse: X <- X (2 - A X).
    static Doubles cayley_by_series(const Doubles & q, int64_t b) {
        Doubles a = identity(b), sum = identity(b);
        double norm = 0;
        for (size_t e = 0; e < q.size(); ++e) {
            a[e] -= q[e];
            sum[e] += q[e];
            norm += a[e] * a[e];
        }
        Doubles inverse(a.size());
        for (int64_t e = 0; e < b * b; ++e) {
            inverse[e] = a[e % b * b + e / b] / norm; // the transpose over the squared norm converges
        }
        for (int step = 0; step < 60; ++step) {
            Doubles rest = times(a, inverse, b);
            for (int64_t e = 0; e < b * b; ++e) {
                rest[e] = 2.0 * (e / b == e % b) - rest[e];
            }
            inverse = times(inverse, rest, b);
        }
        return times(sum, inverse, b);
    }

    static std::vector<Doubles> rotations(const LoraModule & m, int64_t n, int64_t b, double constraint) {
        std::vector<Doubles> out;
        double norm = 0;
        for (int64_t k = 0; k < n; ++k) {
            Doubles q(static_cast<size_t>(b * b));
            for (int64_t e = 0; e < b * b; ++e) {
                q[e] = at(m, "blocks", k * b * b + e) - at(m, "blocks", k * b * b + e % b * b + e / b);
                norm += q[e] * q[e];
            }
            out.push_back(q);
        }
        norm = std::sqrt(norm);
        for (Doubles & q : out) {
            for (double & value : q) {
                value *= constraint > 0 && norm > constraint ? constraint / norm : 1;
            }
            q = cayley_by_series(q, b);
        }
        return out;
    }

    LoraTarget target_;
    Sizes d_;
    int64_t k_;
    std::mt19937 rng_;
};

} // namespace sd::test
