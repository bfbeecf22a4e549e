#include "lora/lora_factors.h"

#include "core/affix.h"
#include "core/error.h"
#include "core/half.h"
#include "core/words.h"
#include "nn/dequantise.h"

#include <algorithm>
#include <cmath>
#include <string_view>

namespace sd {
namespace {

bool holds_weights(DType type) {
    switch (type) {
    case DType::i8:
    case DType::i16:
    case DType::i32:
    case DType::i64:
    case DType::boolean:
    case DType::u8:
    case DType::u16:
    case DType::u32:
    case DType::u64:
        return false;
    default:
        return true;
    }
}

// Infinities and NaNs have all bits of the exponent set; a sum over bits has no branch.
bool all_finite(const std::vector<float> & values) {
    uint32_t bad = 0;
    for (const float value : values) {
        bad |= (bits_of_float(value) & 0x7f800000u) == 0x7f800000u;
    }
    return bad == 0;
}

std::vector<int64_t> without_trailing_ones(std::vector<int64_t> shape, size_t at_least) {
    while (shape.size() > at_least && shape.back() == 1) {
        shape.pop_back();
    }
    return shape;
}

// Adds zeros behind the elements of each row.
Factor padded_rows(const Factor & from, int64_t rows, int64_t to_columns,
                   const std::vector<int64_t> & shape) {
    const int64_t columns = element_count(from.shape) / rows;
    Factor out{shape, std::vector<float>(static_cast<size_t>(rows * to_columns))};
    for (int64_t row = 0; row < rows; ++row) {
        std::copy_n(from.data.begin() + row * columns, columns, out.data.begin() + row * to_columns);
    }
    return out;
}

} // namespace

std::vector<int64_t> matrix_shape(const StoredTensor & stored) {
    std::vector<int64_t> out;
    for (int i = std::min(stored.dims, 4) - 1; i >= 0; --i) {
        out.push_back(stored.ne[i]);
    }
    while (out.size() < 2 || out.size() == 3) {
        out.insert(out.begin(), 1);
    }
    return out;
}

std::string shape_words(const std::vector<int64_t> & shape) {
    std::string out;
    for (const int64_t n : shape) {
        out += (out.empty() ? "" : "x") + std::to_string(n);
    }
    return out.empty() ? "a number" : out;
}

int64_t element_count(const std::vector<int64_t> & shape) {
    int64_t out = 1;
    for (const int64_t n : shape) {
        out *= n;
    }
    return out;
}

double scalar_of(const StoredTensor & stored) {
    if (count(stored.ne) != 1) {
        return std::nan("");
    }
    if (stored.type == DType::f64) {
        double out;
        std::memcpy(&out, stored.data(), sizeof out);
        return out;
    }
    float out;
    dequantise(stored, &out);
    return out;
}

Factor read_factor(const StoredTensor & stored, const std::vector<int64_t> & shape) {
    if (!holds_weights(stored.type)) {
        throw Misfit{text("its factor is of type %s, which holds no weights", dtype_name(stored.type))};
    }
    Factor out{shape, std::vector<float>(static_cast<size_t>(count(stored.ne)))};
    dequantise(stored, out.data.data());
    if (!all_finite(out.data)) {
        fail(Status::bad_file,
             "%s: tensor '%s' holds NaN or infinity; its training broke down, and no image would "
             "survive it",
             stored.file->path().c_str(), printable(stored.name).c_str());
    }
    return out;
}

Factor read_exactly(const StoredTensor & stored, const std::vector<int64_t> & shape, const char * role) {
    const std::vector<int64_t> there = matrix_shape(stored);
    if (without_trailing_ones(there, shape.size()) != shape) {
        throw Misfit{text("its %s is %s, where %s is due", role, shape_words(there).c_str(),
                          shape_words(shape).c_str()),
                     true};
    }
    return read_factor(stored, shape);
}

Factor read_inputs(const StoredTensor & stored, const WeightForm & form, bool with_kernel, const char * role,
                   int64_t * padded) {
    const std::vector<int64_t> there = matrix_shape(stored);
    const int64_t taps = with_kernel ? form.taps() : 1;
    const bool flat = there.size() == 2;
    const int64_t kh = with_kernel ? form.kh : 1, kw = with_kernel ? form.kw : 1;
    if (!flat && (there[2] != kh || there[3] != kw)) {
        throw Misfit{text("its %s has a kernel of %lldx%lld, where the weight has %lldx%lld", role,
                          static_cast<long long>(there[2]), static_cast<long long>(there[3]),
                          static_cast<long long>(kh), static_cast<long long>(kw)),
                     true};
    }
    if (flat && there[1] % taps != 0) {
        throw Misfit{text("its %s is %s, which holds no kernels of %lldx%lld", role,
                          shape_words(there).c_str(), static_cast<long long>(kh), static_cast<long long>(kw)),
                     true};
    }
    const int64_t inputs = flat ? there[1] / taps : there[1];
    std::vector<int64_t> shape{there[0], form.in};
    if (taps > 1) {
        shape.insert(shape.end(), {kh, kw});
    }
    if (inputs == form.in) {
        return read_factor(stored, shape);
    }
    if (!padded || inputs > form.in || inputs < 1) {
        throw Misfit{text("takes %lld inputs (%s is %s), where the weight takes %lld",
                          static_cast<long long>(inputs), role, shape_words(there).c_str(),
                          static_cast<long long>(form.in)),
                     true, inputs};
    }
    *padded = inputs;
    return padded_rows(read_factor(stored, there), there[0], form.in * taps, shape);
}

// Where the model takes more channels than usual the usual ones come first: inpainting, FLUX Fill, pix2pix.
bool is_input_embedding(const Weight & weight) {
    for (const std::string_view end : {".input_blocks.0.0.weight", ".img_in.weight", ".x_embedder.weight",
                                       ".x_embedder.proj.weight", ".conv_in.weight"}) {
        if (ends_with(weight.name, end)) {
            return true;
        }
    }
    return false;
}

WeightForm form_at(const LoraTarget & target) {
    WeightForm out = form_of(*target.weight);
    out.out = target.rows;
    return out;
}

WeightForm matrix_form_at(const LoraTarget & target) {
    const WeightForm out = form_at(target);
    if (out.is_vector()) {
        throw Misfit{"changes a matrix, where the model has a vector", true};
    }
    return out;
}

const StoredTensor & need(const StoredTensor * tensor, const char * role) {
    if (!tensor) {
        throw Misfit{text("its %s is missing", role)};
    }
    if (count(tensor->ne) == 0) {
        throw Misfit{text("its %s is empty (%s)", role, shape_words(matrix_shape(*tensor)).c_str())};
    }
    return *tensor;
}

Factor read_vector(const StoredTensor & stored, int64_t length, const char * role) {
    if (count(stored.ne) != length) {
        throw Misfit{text("its %s is %s, where %lld elements are due", role,
                          shape_words(matrix_shape(stored)).c_str(), static_cast<long long>(length)),
                     true};
    }
    return read_factor(stored, {length});
}

} // namespace sd
