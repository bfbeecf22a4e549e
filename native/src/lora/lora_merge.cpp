#include "lora/lora_merge.h"

#include "core/error.h"
#include "core/parallel.h"
#include "lora/lora_matrix.h"
#include "nn/device.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace sd {
namespace {

// Rows of a weight are worked on in pieces of about this many elements, which stay in a core's cache.
constexpr int64_t piece_elements = 1 << 16;

bool has_dense(const WeightSum & sum) {
    return std::any_of(sum.terms.begin(), sum.terms.end(), [](const WeightSum::Term & term) {
        return term.update->dense.make || !term.update->kronecker.a.empty();
    });
}

void add_scaled(float * to, const std::vector<float> & from, float factor) {
    for (size_t i = 0; i < from.size(); ++i) {
        to[i] += factor * from[i];
    }
}

// Rows [first, first + n) of the weight, as far as the term's target covers them.
void add_rows(const WeightSum::Term & term, double multiplier, int64_t first, int64_t n, const float * base,
              float * to) {
    const Update & update = *term.update;
    const int64_t columns = update.shape.columns(), taps = update.shape.taps;
    const int64_t from = std::max(first, update.target.first_row);
    const int64_t until = std::min(first + n, update.target.first_row + update.target.rows);
    const auto m = static_cast<float>(multiplier);
    if (from >= until) {
        return;
    }
    const int64_t row = from - update.target.first_row; // of the update
    to += (from - first) * columns;
    base = base ? base + (from - first) * columns : nullptr; // asked for only where something scales it
    if (update.rank > 0) {
        add_product(to, update.up.data() + row * update.rank, update.down.data(), until - from, update.rank,
                    columns, m);
    }
    for (int64_t i = 0; i < until - from && !update.row_scale.empty(); ++i) {
        for (int64_t j = 0; j < columns; ++j) {
            to[i * columns + j] += m * update.row_scale[row + i] * base[i * columns + j];
        }
    }
    for (int64_t i = 0; i < until - from && !update.input_scale.empty(); ++i) {
        for (int64_t j = 0; j < columns; ++j) {
            to[i * columns + j] += m * update.input_scale[j / taps] * base[i * columns + j];
        }
    }
}

} // namespace

struct LoraMerge::Piece {
    const WeightSum * sum;
    int64_t first, rows, columns;
};

// Updates that have to be made whole take their weight in one piece.
std::vector<LoraMerge::Piece> LoraMerge::pieces(const std::vector<WeightSum> & sums) const {
    std::vector<Piece> out;
    for (const WeightSum & sum : sums) {
        const MatrixShape shape = matrix_shape(*sum.weight);
        int64_t rows = has_dense(sum) ? shape.rows : std::max<int64_t>(1, piece_elements / shape.columns());
        if (shape.columns() == 1 || shape.columns() % sum.weight->ne[0] != 0) { // a vector is one row to ggml
            rows = shape.rows;
        }
        for (int64_t first = 0; first < shape.rows; first += rows) {
            out.push_back({&sum, first, std::min(rows, shape.rows - first), shape.columns()});
        }
    }
    return out;
}

// Infinite weights would paint black.
void LoraMerge::check_range(const Piece & piece, const std::vector<float> & rows) const {
    const float largest = weights_.largest_value(*piece.sum->weight, options_.requantise);
    for (const float value : rows) {
        if (!(std::abs(value) <= largest)) {
            fail(Status::bad_argument,
                 "with these multipliers '%s' gets a value of %g, but its type ends at %g",
                 piece.sum->weight->name.c_str(), static_cast<double>(value), static_cast<double>(largest));
        }
    }
}

void LoraMerge::prepare(const Weight & weight) { weights_.make_writable(weight, options_.requantise); }

void LoraMerge::compute(const Piece & piece, bool onto_resident, std::vector<float> & rows) const {
    const WeightSum & sum = *piece.sum;
    const int64_t first = piece.first * piece.columns, n = piece.rows * piece.columns;
    const bool needs_base =
        !onto_resident || std::any_of(sum.terms.begin(), sum.terms.end(),
                                      [](const auto & term) { return term.update->needs_base(); });
    std::vector<float> base(needs_base ? static_cast<size_t>(n) : 0);
    if (needs_base) {
        weights_.read_base(*sum.weight, first, n, base.data());
    }
    if (onto_resident) {
        rows.resize(static_cast<size_t>(n));
        weights_.read(*sum.weight, first, n, rows.data());
    } else {
        rows = base;
    }
    for (const WeightSum::Term & term : sum.terms) {
        const Update & update = *term.update;
        const double multiplier = onto_resident ? term.multiplier - term.former : term.multiplier;
        if (!update.dense.make && update.kronecker.a.empty()) {
            add_rows(term, multiplier, piece.first, piece.rows, needs_base ? base.data() : nullptr,
                     rows.data());
            continue;
        }
        const int64_t at = update.target.first_row * piece.columns;
        const float * own = needs_base ? base.data() + at : nullptr;
        if (update.is_linear()) {
            add_scaled(rows.data() + at, delta_of(update, own, 1.0f), static_cast<float>(multiplier));
            continue;
        }
        add_scaled(rows.data() + at, delta_of(update, own, static_cast<float>(term.multiplier)), 1.0f);
        if (onto_resident && term.former != 0) {
            add_scaled(rows.data() + at, delta_of(update, own, static_cast<float>(term.former)), -1.0f);
        }
    }
}

void LoraMerge::rebuild(const std::vector<WeightSum> & sums) {
    std::vector<WeightSum> touched;
    for (const WeightSum & sum : sums) {
        if (!sum.terms.empty()) {
            prepare(*sum.weight);
            touched.push_back(sum);
        }
    }
    const std::vector<Piece> work = pieces(touched);
    parallel_for(device_.threads(), work.size(), [&](size_t i) {
        std::vector<float> rows;
        compute(work[i], false, rows);
        check_range(work[i], rows);
        weights_.write(*work[i].sum->weight, work[i].first * work[i].columns,
                       static_cast<int64_t>(rows.size()), rows.data());
    });
    for (const WeightSum & sum : sums) {
        if (sum.terms.empty()) {
            weights_.restore(*sum.weight);
        }
    }
}

void LoraMerge::add(const std::vector<WeightSum> & sums) {
    // All of it is computed before the first weight changes, since there is no way back by arithmetic.
    const std::vector<Piece> work = pieces(sums);
    std::vector<std::vector<float>> results(work.size());
    parallel_for(device_.threads(), work.size(), [&](size_t i) {
        compute(work[i], true, results[i]);
        check_range(work[i], results[i]);
    });
    for (const WeightSum & sum : sums) {
        prepare(*sum.weight);
    }
    parallel_for(device_.threads(), work.size(), [&](size_t i) {
        weights_.write(*work[i].sum->weight, work[i].first * work[i].columns,
                       static_cast<int64_t>(results[i].size()), results[i].data());
    });
}

double LoraMerge::drift(const std::vector<WeightSum> & sums) const {
    const std::vector<Piece> work = pieces(sums);
    std::vector<std::pair<double, double>> squares(work.size()); // of the error, of the exact values
    parallel_for(device_.threads(), work.size(), [&](size_t i) {
        const Piece & piece = work[i];
        const Weight & weight = *piece.sum->weight;
        std::vector<float> exact, resident;
        compute(piece, false, exact);
        resident.resize(exact.size());
        weights_.read(weight, piece.first * piece.columns, static_cast<int64_t>(exact.size()),
                      resident.data());
        if (!piece.sum->terms.empty()) { // as rebuild() would; it gives one without terms its own bytes
            weights_.round(weight, options_.requantise, exact);
        }
        for (size_t k = 0; k < exact.size(); ++k) {
            const double error = static_cast<double>(resident[k]) - exact[k];
            squares[i].first += error * error;
            squares[i].second += static_cast<double>(exact[k]) * exact[k];
        }
    });
    double error = 0, all = 0;
    for (const auto & [of_error, of_exact] : squares) {
        error += of_error;
        all += of_exact;
    }
    return all > 0 ? std::sqrt(error / all) : 0;
}

} // namespace sd
