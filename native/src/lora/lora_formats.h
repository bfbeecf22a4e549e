// The mathematics of adapters: what a module adds to its weight, whatever format stored it (lora-formats.md,
// section 2). One file per kind; add_to and delta_of are the definition that everything else is checked
// against.
#pragma once

#include "lora/lora_module.h"

#include <functional>
#include <string>
#include <vector>

namespace sd {

// A weight as a matrix, row by row: outputs by inputs, each input with its taps of the kernel. A vector is a
// column, a table of embeddings has a row per entry.
struct MatrixShape {
    int64_t rows = 0, inputs = 0, taps = 1;

    int64_t columns() const { return inputs * taps; }
};
MatrixShape matrix_shape(const Weight & weight);

// W' − W at multiplier 1, of the target's rows: the sum of all parts that are there. It depends on nothing
// but the module and the pristine W, so that adapters may come and go in any order.
struct Update {
    std::string stem;
    LoraKind kind = LoraKind::low_rank;
    LoraTarget target;
    MatrixShape shape; // of the target's rows

    // up down, with the scale in `up`.
    int64_t rank = 0;
    std::vector<float> down, up; // [rank, columns], [rows, rank]

    // The Kronecker product a x b: its element (i·O2 + k, j·I2 + l) is a[i, j] · b[k, l].
    struct Kronecker {
        int64_t o1 = 0, i1 = 0, o2 = 0, i2 = 0;
        std::vector<float> a, b; // [o1, i1], [o2, i2]
    };
    Kronecker kronecker;

    // Each row, and each input's columns, of W times these.
    std::vector<float> row_scale, input_scale; // [rows], [inputs]

    // Anything else, made when it is asked for, since it is as large as W: the change at this multiplier.
    struct Dense {
        std::function<std::vector<float>(const float * base, float multiplier)> make;
        bool needs_base = false; // else `base` may be null
        bool linear = true;      // whether the change grows with the multiplier; all other parts do
    };
    Dense dense;

    bool is_linear() const { return !dense.make || dense.linear; }
    bool needs_base() const { return dense.needs_base || !row_scale.empty() || !input_scale.empty(); }
    size_t bytes() const; // of the factors that it holds
};

// The pristine rows of a target in f32.
using BaseRows = std::function<std::vector<float>()>;

// Throws Error(bad_file) where factors do not fit each other or the weight. Asks for `base` only where the
// module's parts depend on it.
Update make_update(LoraModule && module, const BaseRows & base);

// The whole change of the target's rows at this multiplier.
std::vector<float> delta_of(const Update & update, const float * base, float multiplier);

// One kind each, in the file's order of rows. What they return has no target yet.
Update low_rank_update(LoraModule & module, const MatrixShape & shape);
Update loha_update(LoraModule & module, const MatrixShape & shape);
Update lokr_update(LoraModule & module, const MatrixShape & shape);
Update glora_update(LoraModule & module, const MatrixShape & shape, const std::vector<float> & base);
Update ia3_update(LoraModule & module, const MatrixShape & shape);
Update dense_update(LoraModule & module, const MatrixShape & shape);
Update replace_update(LoraModule & module, const MatrixShape & shape);
Update oft_update(LoraModule & module, const MatrixShape & shape);
Update boft_update(LoraModule & module, const MatrixShape & shape);
Update oft_input_update(LoraModule & module, const MatrixShape & shape);

// The update with its sum brought to the magnitudes of DoRA.
Update dora_update(Update && update, const Factor & magnitude, bool of_columns,
                   const std::vector<float> & base);

// Taking factors out of a module, with their sizes checked.
bool has_factor(const LoraModule & module, const char * role);
std::vector<float> take_factor(LoraModule & module, const char * role, size_t elements);
const Factor & factor_of(const LoraModule & module, const char * role);
int64_t dimension(const LoraModule & module, const char * role, size_t index);

} // namespace sd
