// LoHa: the element by element product of two low-rank matrices (Hyeon-Woo et al., 2022, "FedPara").
#include "lora/lora_formats.h"
#include "lora/lora_matrix.h"

#include <memory>

namespace sd {
namespace {

struct LowRank {
    int64_t rank;
    std::vector<float> up, down; // [rows, rank], [rank, columns]
};

// With a Tucker core the first factor lies transposed, (rank, rows), and the second has no taps.
LowRank take_pair(LoraModule & module, const MatrixShape & shape, const char * a, const char * b,
                  const char * core) {
    if (!has_factor(module, core)) {
        const int64_t rank = dimension(module, b, 0);
        return {rank, take_factor(module, a, static_cast<size_t>(shape.rows * rank)),
                take_factor(module, b, static_cast<size_t>(rank * shape.columns()))};
    }
    const int64_t p = dimension(module, core, 0), q = dimension(module, core, 1);
    const auto up = take_factor(module, a, static_cast<size_t>(p * shape.rows));
    const auto middle = take_factor(module, core, static_cast<size_t>(p * q * shape.taps));
    const auto down = take_factor(module, b, static_cast<size_t>(q * shape.inputs));
    return {p, transposed(up, p, shape.rows), contracted(middle, down, p, q, shape.inputs, shape.taps)};
}

// A product of rank r1 · r2 whose factors are all products of a column, and of a row, of the two pairs.
Update as_low_rank(const LowRank & x, const LowRank & y, const MatrixShape & shape) {
    const int64_t rank = x.rank * y.rank, columns = shape.columns();
    Update update;
    update.rank = rank;
    update.up.resize(static_cast<size_t>(shape.rows * rank));
    update.down.resize(static_cast<size_t>(rank * columns));
    for (int64_t p = 0; p < x.rank; ++p) {
        for (int64_t q = 0; q < y.rank; ++q) {
            const int64_t at = p * y.rank + q;
            for (int64_t i = 0; i < shape.rows; ++i) {
                update.up[i * rank + at] = x.up[i * x.rank + p] * y.up[i * y.rank + q];
            }
            for (int64_t j = 0; j < columns; ++j) {
                update.down[at * columns + j] = x.down[p * columns + j] * y.down[q * columns + j];
            }
        }
    }
    return update;
}

} // namespace

Update loha_update(LoraModule & module, const MatrixShape & shape) {
    LowRank x = take_pair(module, shape, "w1_a", "w1_b", "t1");
    const LowRank y = take_pair(module, shape, "w2_a", "w2_b", "t2");
    for (float & value : x.up) {
        value *= static_cast<float>(module.scale);
    }
    // As a pair it costs r1·r2 (rows + columns) a token, dense rows · columns.
    if (2 * x.rank * y.rank * (shape.rows + shape.columns()) <= shape.rows * shape.columns()) {
        return as_low_rank(x, y, shape);
    }
    Update update;
    update.dense.make = [pairs = std::make_shared<std::pair<LowRank, LowRank>>(std::move(x), y),
                         shape](const float *, float) {
        const auto & [a, b] = *pairs;
        auto delta = product(a.up, a.down, shape.rows, a.rank, shape.columns());
        const auto other = product(b.up, b.down, shape.rows, b.rank, shape.columns());
        for (size_t i = 0; i < delta.size(); ++i) {
            delta[i] *= other[i];
        }
        return delta;
    };
    return update;
}

} // namespace sd
