// OFT, BOFT and PEFT's OFT: W rotated block by block (Qiu et al., 2023; Liu et al., 2024,
// "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization"). Rotations are made in double from
// skew-symmetric matrices.
#include "core/error.h"
#include "lora/lora_formats.h"
#include "lora/lora_matrix.h"

#include <algorithm>
#include <cmath>

namespace sd {
namespace {

// (I + Q)(I − Q)⁻¹ of each block, Q = B − Bᵀ, where the norm of all Q together is at most the constraint.
std::vector<float> rotations(const std::vector<float> & blocks, int64_t n, int64_t b,
                             const std::optional<double> & constraint) {
    std::vector<double> q(blocks.size());
    double squares = 0;
    for (int64_t k = 0; k < n; ++k) {
        for (int64_t i = 0; i < b; ++i) {
            for (int64_t j = 0; j < b; ++j) {
                const double value =
                    static_cast<double>(blocks[(k * b + i) * b + j]) - blocks[(k * b + j) * b + i];
                q[(k * b + i) * b + j] = value;
                squares += value * value;
            }
        }
    }
    const double norm = std::sqrt(squares);
    if (constraint && norm > *constraint) {
        for (double & value : q) {
            value *= *constraint / norm;
        }
    }
    std::vector<float> out;
    for (int64_t k = 0; k < n; ++k) {
        const auto r = cayley({q.begin() + k * b * b, q.begin() + (k + 1) * b * b}, b);
        out.insert(out.end(), r.begin(), r.end());
    }
    return out;
}

std::vector<float> take_rescale(LoraModule & module, int64_t rows) {
    return has_factor(module, "rescale") ? take_factor(module, "rescale", static_cast<size_t>(rows))
                                         : std::vector<float>(static_cast<size_t>(rows), 1.0f);
}

void check_blocks(const LoraModule & module, int64_t n, int64_t b, int64_t size, const char * of) {
    if (n * b != size) {
        fail(Status::bad_file, "%s: %lld blocks of %lld do not cover the %lld %s of its weight",
             module.stem.c_str(), static_cast<long long>(n), static_cast<long long>(b),
             static_cast<long long>(size), of);
    }
}

// I + Q + ... of PEFT, which cuts the series of the Cayley transform off: 1, 2, 2, ..., 2, 1 times the powers
// of Q.
std::vector<double> cayley_series(const std::vector<double> & q, int64_t n, int terms) {
    std::vector<double> sum(q.size()), power(q.size());
    for (int64_t i = 0; i < n; ++i) {
        power[i * n + i] = 1;
    }
    for (int term = 0; term < terms; ++term) {
        const double share = term == 0 || (term + 1 == terms && term > 1) ? 1 : 2;
        for (size_t i = 0; i < sum.size(); ++i) {
            sum[i] += share * power[i];
        }
        std::vector<double> next(q.size());
        for (int64_t i = 0; i < n; ++i) {
            for (int64_t k = 0; k < n; ++k) {
                for (int64_t j = 0; j < n; ++j) {
                    next[i * n + j] += power[i * n + k] * q[k * n + j];
                }
            }
        }
        power = std::move(next);
    }
    return sum;
}

} // namespace

// Rows: W'ₖ = rescale · Rₖᵀ Wₖ.
Update oft_update(LoraModule & module, const MatrixShape & shape) {
    const int64_t n = dimension(module, "blocks", 0), b = dimension(module, "blocks", 1);
    check_blocks(module, n, b, shape.rows, "rows");
    const auto r =
        rotations(take_factor(module, "blocks", static_cast<size_t>(n * b * b)), n, b, module.constraint);
    Update update;
    update.dense.needs_base = true;
    update.dense.make = [r, rescale = take_rescale(module, shape.rows), shape, n, b](const float * w, float) {
        const int64_t columns = shape.columns();
        std::vector<float> out(static_cast<size_t>(shape.rows * columns));
        for (int64_t k = 0; k < n; ++k) {
            const auto turn = transposed({r.begin() + k * b * b, r.begin() + (k + 1) * b * b}, b, b);
            add_product(out.data() + k * b * columns, turn.data(), w + k * b * columns, b, b, columns, 1.0f);
        }
        for (int64_t i = 0; i < shape.rows * columns; ++i) {
            out[i] = rescale[i / columns] * out[i] - w[i];
        }
        return out;
    };
    return update;
}

// Stage after stage: rows 2ⁱ·b/2 apart are brought together, blocks of them rotated, and put back. A
// multiplier turns each stage part of the way, which does not add up: the change is made anew for each
// multiplier.
Update boft_update(LoraModule & module, const MatrixShape & shape) {
    const int64_t stages = dimension(module, "blocks", 0), n = dimension(module, "blocks", 1);
    const int64_t b = dimension(module, "blocks", 2);
    check_blocks(module, n, b, shape.rows, "rows");
    const bool butterfly = stages <= 32 && b % 2 == 0 && shape.rows % (b << (stages - 1)) == 0;
    if (!butterfly) {
        fail(Status::bad_file, "%s: %lld stages of blocks of %lld do not interleave %lld rows",
             module.stem.c_str(), static_cast<long long>(stages), static_cast<long long>(b),
             static_cast<long long>(shape.rows));
    }
    const auto r = rotations(take_factor(module, "blocks", static_cast<size_t>(stages * n * b * b)),
                             stages * n, b, module.constraint);
    Update update;
    update.dense.needs_base = true;
    update.dense.linear = false;
    update.dense.make = [r, rescale = take_rescale(module, shape.rows), shape, stages, n, b](const float * w,
                                                                                             float m) {
        const int64_t columns = shape.columns(), size = shape.rows * columns;
        std::vector<float> now(w, w + size), gathered(static_cast<size_t>(size)),
            turned(static_cast<size_t>(size));
        for (int64_t stage = 0; stage < stages; ++stage) {
            const int64_t apart = (b / 2)
                                  << stage; // rows (c, g, k) with g of 2 and k of `apart` become (c, k, g)
            const auto gathered_row = [&](int64_t row) {
                const int64_t c = row / (2 * apart), g = row / apart % 2, k = row % apart;
                return (c * apart + k) * 2 + g;
            };
            for (int64_t row = 0; row < shape.rows; ++row) {
                std::copy_n(now.data() + row * columns, columns,
                            gathered.data() + gathered_row(row) * columns);
            }
            std::fill(turned.begin(), turned.end(), 0.0f);
            for (int64_t k = 0; k < n; ++k) {
                std::vector<float> turn(r.begin() + (stage * n + k) * b * b,
                                        r.begin() + (stage * n + k + 1) * b * b);
                for (int64_t i = 0; i < b * b; ++i) {
                    turn[i] = m * turn[i] + (i / b == i % b ? 1.0f - m : 0.0f);
                }
                add_product(turned.data() + k * b * columns, turn.data(), gathered.data() + k * b * columns,
                            b, b, columns, 1.0f);
            }
            for (int64_t row = 0; row < shape.rows; ++row) {
                std::copy_n(turned.data() + gathered_row(row) * columns, columns, now.data() + row * columns);
            }
        }
        for (int64_t i = 0; i < size; ++i) {
            now[i] = (1.0f + m * (rescale[i / columns] - 1.0f)) * now[i] - w[i];
        }
        return now;
    };
    return update;
}

// Inputs, taps included: W' = W Rᵀ, R of blocks along the diagonal; one block may serve all.
Update oft_input_update(LoraModule & module, const MatrixShape & shape) {
    const int64_t n = dimension(module, "rotation", 0), triangle = dimension(module, "rotation", 1);
    const int64_t b =
        static_cast<int64_t>(std::llround((1 + std::sqrt(1.0 + 8.0 * static_cast<double>(triangle))) / 2));
    const int64_t columns = shape.columns();
    if (n != 1 || columns % b != 0) {
        check_blocks(module, n, b, columns, "inputs");
    }
    const auto rotation = take_factor(module, "rotation", static_cast<size_t>(n * (b * (b - 1) / 2)));
    std::vector<float> turns; // Rᵀ − I of each block
    for (int64_t k = 0; k < n; ++k) {
        std::vector<double> q(static_cast<size_t>(b * b));
        int64_t at = k * triangle;
        for (int64_t i = 0; i < b; ++i) {
            for (int64_t j = i + 1; j < b; ++j, ++at) {
                q[i * b + j] = rotation[at];
                q[j * b + i] = -static_cast<double>(rotation[at]);
            }
        }
        if (module.cayley_terms == 0) { // PEFT turns the other way then
            for (double & value : q) {
                value = -value;
            }
        }
        const auto r = module.cayley_terms == 0 ? cayley(q, b) : cayley_series(q, b, module.cayley_terms);
        for (int64_t i = 0; i < b; ++i) {
            for (int64_t j = 0; j < b; ++j) {
                turns.push_back(static_cast<float>(r[j * b + i] - (i == j)));
            }
        }
    }
    Update update;
    update.dense.needs_base = true;
    update.dense.make = [turns, shape, n, b](const float * w, float) {
        const int64_t width = shape.columns();
        std::vector<float> out(static_cast<size_t>(shape.rows * width));
        for (int64_t row = 0; row < shape.rows; ++row) {
            for (int64_t k = 0; k < width / b; ++k) {
                add_product(out.data() + row * width + k * b, w + row * width + k * b,
                            turns.data() + k % n * b * b, 1, b, b, 1.0f);
            }
        }
        return out;
    };
    return update;
}

} // namespace sd
