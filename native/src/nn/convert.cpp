#include "nn/convert.h"

#include "core/error.h"
#include "core/half.h"
#include "core/words.h"
#include "nn/dequantise.h"

#include <ggml.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace sd {
namespace {

constexpr int64_t ELEMENTS_AT_ONCE = 1 << 14; // floats of them stay in a core's cache
constexpr float   LARGEST_QUANTISED = 65504;  // blocks keep their scales in f16
constexpr float   LEAST_IMPORTANCE = 1e-6f;   // of the mean: ggml divides by sums of these

// ggml's types of activations, and whole numbers, are none of weights.
bool is_target(DType type) {
    switch (type) {
    case DType::f32:
    case DType::f16:
    case DType::bf16:
    case DType::f8_e4m3:
    case DType::f8_e5m2: return true;
    case DType::q8_1:
    case DType::q8_k: return false;
    default: return is_quantised(type);
    }
}

float largest(DType type) {
    switch (type) {
    case DType::f16: return 65504;
    case DType::bf16: return 3.3895314e38f;
    case DType::f8_e4m3: return 448;
    case DType::f8_e5m2: return 57344;
    case DType::f32: return HUGE_VALF;
    default: return LARGEST_QUANTISED;
    }
}

// The first number of a row that the type cannot hold.
void check_range(DType type, const float * row, int64_t length, int64_t row_index) {
    const float limit = largest(type);
    const bool  quantised = is_quantised(type);
    const auto  wrong = std::find_if(row, row + length, [&](float x) {
        return !(std::fabs(x) <= limit) && (quantised || std::isfinite(x));
    });
    if (wrong == row + length) {
        return;
    }
    const std::string place = text("row %s, column %s holds %g", grouped(static_cast<uint64_t>(row_index)).c_str(),
                                   grouped(static_cast<uint64_t>(wrong - row)).c_str(), static_cast<double>(*wrong));
    if (!std::isfinite(*wrong)) {
        fail(Status::bad_argument, "%s, which would spoil a whole block of %s; is the source damaged?", place.c_str(),
             dtype_name(type));
    }
    fail(Status::bad_argument, "%s, but %s ends at %g here; keep this tensor in f32 or bf16", place.c_str(),
         dtype_name(type), static_cast<double>(limit));
}

// Weights of columns with mean 1, none of them 0.
std::vector<float> normalised(const float * importance, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) {
        if (!std::isfinite(importance[i]) || importance[i] < 0) {
            fail(Status::bad_argument, "the importance of column %lld is %g; expected a finite number from 0 up",
                 static_cast<long long>(i), static_cast<double>(importance[i]));
        }
        sum += importance[i];
    }
    std::vector<float> out(static_cast<size_t>(n), 1.0f);
    const double       mean = sum / static_cast<double>(n);
    for (int64_t i = 0; i < n && mean > 0; ++i) {
        out[i] = std::max(static_cast<float>(importance[i] / mean), LEAST_IMPORTANCE);
    }
    return out;
}

} // namespace

bool can_read(DType type) {
    return !is_quantised(type) || ggml_get_type_traits(static_cast<ggml_type>(type))->to_float != nullptr;
}

bool can_write(DType type) { return is_target(type); }

bool wants_importance(DType type) {
    return is_quantised(type) && ggml_quantize_requires_imatrix(static_cast<ggml_type>(type));
}

size_t row_bytes(DType type, int64_t row_length) {
    const DTypeInfo & info = *dtype_info(static_cast<int32_t>(type));
    if (row_length < 0 || row_length % info.block != 0) {
        fail(Status::bad_argument, "rows of %lld are no whole blocks of %s, which has %lld in a block",
             static_cast<long long>(row_length), info.name, static_cast<long long>(info.block));
    }
    return static_cast<size_t>(row_length / info.block) * info.block_bytes;
}

void convert_rows(DType from, const void * source, DType to, void * target, int64_t rows, int64_t row_length,
                  const float * importance) {
    const size_t from_bytes = row_bytes(from, row_length), to_bytes = row_bytes(to, row_length);
    if (from == to) {
        std::memcpy(target, source, from_bytes * static_cast<size_t>(rows));
        return;
    }
    if (!can_read(from) || !can_write(to)) {
        fail(Status::bad_argument, "elements of type %s cannot be made of %s", dtype_name(to), dtype_name(from));
    }
    if (rows == 0 || row_length == 0) {
        return;
    }
    std::vector<float> weights;
    if (is_quantised(to) && (importance || wants_importance(to))) {
        weights = importance ? normalised(importance, row_length)
                             : std::vector<float>(static_cast<size_t>(row_length), 1.0f);
    }
    const int64_t      at_once = std::clamp<int64_t>(ELEMENTS_AT_ONCE / row_length, 1, rows);
    std::vector<float> floats(static_cast<size_t>(at_once * row_length));
    const auto *       in = static_cast<const uint8_t *>(source);
    auto *             out = static_cast<uint8_t *>(target);
    for (int64_t row = 0; row < rows; row += at_once) {
        const int64_t n = std::min(at_once, rows - row);
        dequantise(from, in + static_cast<size_t>(row) * from_bytes, floats.data(), n * row_length);
        for (int64_t i = 0; i < n; ++i) {
            check_range(to, floats.data() + i * row_length, row_length, row + i);
        }
        void * place = out + static_cast<size_t>(row) * to_bytes;
        if (is_quantised(to)) {
            ggml_quantize_chunk(static_cast<ggml_type>(to), floats.data(), place, 0, n, row_length,
                                weights.empty() ? nullptr : weights.data());
        } else {
            from_f32(to, floats.data(), place, static_cast<size_t>(n * row_length));
        }
    }
}

} // namespace sd
