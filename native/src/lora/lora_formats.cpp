#include "lora/lora_formats.h"

#include "core/error.h"
#include "lora/lora_matrix.h"

#include <algorithm>
#include <memory>
#include <utility>

namespace sd {
namespace {

// Exchanges the upper and the lower half of a matrix's rows.
void swap_halves(std::vector<float> & matrix) {
    const auto half = static_cast<std::ptrdiff_t>(matrix.size() / 2);
    std::swap_ranges(matrix.begin(), matrix.begin() + half, matrix.begin() + half);
}

// From the file's order of rows to the weight's.
void swap_halves(Update & update) {
    swap_halves(update.up);
    swap_halves(update.row_scale);
    if (update.dense.make) {
        update.dense.make = [inner = std::move(update.dense.make),
                             size = update.shape.rows * update.shape.columns()](const float * base,
                                                                                float multiplier) {
            std::vector<float> in_file_order;
            if (base) {
                in_file_order.assign(base, base + size);
                swap_halves(in_file_order);
            }
            std::vector<float> delta = inner(base ? in_file_order.data() : nullptr, multiplier);
            swap_halves(delta);
            return delta;
        };
    }
}

void add_kronecker(const Update::Kronecker & k, float multiplier, float * delta) {
    const int64_t columns = k.i1 * k.i2;
    for (int64_t i = 0; i < k.o1 * k.o2; ++i) {
        const float * b = k.b.data() + i % k.o2 * k.i2;
        for (int64_t j = 0; j < k.i1; ++j) {
            const float a = multiplier * k.a[i / k.o2 * k.i1 + j];
            float * to = delta + i * columns + j * k.i2;
            for (int64_t l = 0; l < k.i2; ++l) {
                to[l] += a * b[l];
            }
        }
    }
}

// A graph multiplies whole weights, and looks rows of tables up: parts that suit neither become dense.
void make_dense_unless(bool suits_graph, Update & update) {
    const bool other =
        !update.kronecker.a.empty() || !update.row_scale.empty() || !update.input_scale.empty();
    if (suits_graph || !other) {
        return;
    }
    Update dense;
    dense.dense.needs_base = update.needs_base();
    dense.dense.linear = update.is_linear();
    dense.shape = update.shape;
    dense.dense.make = [inner = std::make_shared<Update>(std::move(update))](const float * base,
                                                                             float multiplier) {
        return delta_of(*inner, base, multiplier);
    };
    update = std::move(dense);
}

} // namespace

MatrixShape matrix_shape(const Weight & weight) {
    const Shape & ne = weight.ne;
    if (ne[2] * ne[3] > 1) {
        return {ne[3], ne[2], ne[0] * ne[1]};
    }
    return ne[1] > 1 || weight.table ? MatrixShape{ne[1], ne[0], 1} : MatrixShape{ne[0], 1, 1};
}

size_t Update::bytes() const {
    return sizeof(float) * (down.size() + up.size() + kronecker.a.size() + kronecker.b.size() +
                            row_scale.size() + input_scale.size());
}

bool has_factor(const LoraModule & module, const char * role) { return module.factors.count(role) > 0; }

const Factor & factor_of(const LoraModule & module, const char * role) {
    const auto found = module.factors.find(role);
    if (found == module.factors.end()) {
        fail(Status::bad_file, "%s: is a %s without its %s", module.stem.c_str(), lora_kind_name(module.kind),
             role);
    }
    return found->second;
}

int64_t dimension(const LoraModule & module, const char * role, size_t index) {
    const Factor & factor = factor_of(module, role);
    if (index >= factor.shape.size() || factor.shape[index] < 1) {
        fail(Status::bad_file, "%s: %s has %zu dimensions; a %s needs more than %zu, none of them empty",
             module.stem.c_str(), role, factor.shape.size(), lora_kind_name(module.kind), index);
    }
    return factor.shape[index];
}

std::vector<float> take_factor(LoraModule & module, const char * role, size_t elements) {
    factor_of(module, role);
    Factor & factor = module.factors[role];
    if (factor.data.size() != elements) {
        fail(Status::bad_file,
             "%s: %s has %zu elements; with its other factors it needs %zu to fit a weight of %lld rows",
             module.stem.c_str(), role, factor.data.size(), elements,
             static_cast<long long>(module.target.rows));
    }
    return std::move(factor.data);
}

Update make_update(LoraModule && module, const BaseRows & base) {
    const LoraTarget target = module.target;
    const MatrixShape whole = matrix_shape(*target.weight);
    const MatrixShape shape{target.rows, std::max(whole.inputs, module.inputs), whole.taps};
    if (target.first_row < 0 || target.rows < 1 || target.first_row + target.rows > whole.rows ||
        (target.swap_halves && target.rows % 2 != 0)) {
        fail(Status::bad_file, "%s: rows %lld to %lld do not lie within the %lld of %s", module.stem.c_str(),
             static_cast<long long>(target.first_row), static_cast<long long>(target.first_row + target.rows),
             static_cast<long long>(whole.rows), target.weight->name.c_str());
    }
    const auto base_in_file_order = [&] {
        std::vector<float> rows = base();
        if (target.swap_halves) {
            swap_halves(rows);
        }
        return rows;
    };

    Update update;
    switch (module.kind) {
    case LoraKind::low_rank:
        update = low_rank_update(module, shape);
        break;
    case LoraKind::loha:
        update = loha_update(module, shape);
        break;
    case LoraKind::lokr:
        update = lokr_update(module, shape);
        break;
    case LoraKind::dense:
        update = dense_update(module, shape);
        break;
    case LoraKind::replace:
        update = replace_update(module, shape);
        break;
    case LoraKind::ia3:
        update = ia3_update(module, shape);
        break;
    case LoraKind::glora:
        update = glora_update(module, shape, base_in_file_order());
        break;
    case LoraKind::oft:
        update = oft_update(module, shape);
        break;
    case LoraKind::boft:
        update = boft_update(module, shape);
        break;
    case LoraKind::oft_input:
        update = oft_input_update(module, shape);
        break;
    }
    update.shape = shape;
    update.stem = module.stem;

    const bool whole_rows = target.rows == whole.rows;
    if (module.magnitude) {
        update = dora_update(std::move(update), *module.magnitude, module.magnitude_of_columns,
                             base_in_file_order());
        update.shape = shape;
    }
    const bool split_inputs = !whole_rows && !update.input_scale.empty();
    const bool kernel =
        target.weight->ne[2] * target.weight->ne[3] > 1; // its product is no matrix product in a graph
    const bool split_kronecker = (!whole_rows || target.swap_halves || kernel) && !update.kronecker.a.empty();
    const bool matrix = !target.weight->table && whole.columns() > 1;
    make_dense_unless(matrix && !split_inputs && !split_kronecker, update);
    if (target.swap_halves) {
        swap_halves(update);
    }
    update.stem = std::move(module.stem);
    update.kind = module.kind;
    update.target = target;
    return update;
}

std::vector<float> delta_of(const Update & update, const float * base, float multiplier) {
    const int64_t rows = update.shape.rows, columns = update.shape.columns(), taps = update.shape.taps;
    std::vector<float> delta;
    if (update.dense.make) {
        delta = update.dense.make(base, update.dense.linear ? 1.0f : multiplier);
        if (update.dense.linear && multiplier != 1.0f) {
            for (float & value : delta) {
                value *= multiplier;
            }
        }
    }
    delta.resize(static_cast<size_t>(rows * columns));
    if (update.rank > 0) {
        add_product(delta.data(), update.up.data(), update.down.data(), rows, update.rank, columns,
                    multiplier);
    }
    if (!update.kronecker.a.empty()) {
        add_kronecker(update.kronecker, multiplier, delta.data());
    }
    for (int64_t i = 0; i < rows && !update.row_scale.empty(); ++i) {
        for (int64_t j = 0; j < columns; ++j) {
            delta[i * columns + j] += multiplier * update.row_scale[i] * base[i * columns + j];
        }
    }
    for (int64_t i = 0; i < rows && !update.input_scale.empty(); ++i) {
        for (int64_t j = 0; j < columns; ++j) {
            delta[i * columns + j] += multiplier * update.input_scale[j / taps] * base[i * columns + j];
        }
    }
    return delta;
}

} // namespace sd
