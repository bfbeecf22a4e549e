// LoKr: the Kronecker product of two small matrices, either of which may be stored as a product itself.
#include "core/error.h"
#include "lora/lora_formats.h"
#include "lora/lora_matrix.h"

#include <utility>

namespace sd {
namespace {

std::vector<float> take_first(LoraModule & module, int64_t & o1, int64_t & i1) {
    if (has_factor(module, "w1")) {
        o1 = dimension(module, "w1", 0);
        i1 = dimension(module, "w1", 1);
        return take_factor(module, "w1", static_cast<size_t>(o1 * i1));
    }
    const int64_t rank = dimension(module, "w1_b", 0);
    o1 = dimension(module, "w1_a", 0);
    i1 = dimension(module, "w1_b", 1);
    return product(take_factor(module, "w1_a", static_cast<size_t>(o1 * rank)),
                   take_factor(module, "w1_b", static_cast<size_t>(rank * i1)), o1, rank, i1);
}

// [o2, i2, taps]
std::vector<float> take_second(LoraModule & module, int64_t o2, int64_t i2, int64_t taps) {
    if (has_factor(module, "w2")) {
        return take_factor(module, "w2", static_cast<size_t>(o2 * i2 * taps));
    }
    if (has_factor(module, "t2")) { // the first factor lies transposed, (rank, o2)
        const int64_t p = dimension(module, "t2", 0), q = dimension(module, "t2", 1);
        const auto a = take_factor(module, "w2_a", static_cast<size_t>(p * o2));
        const auto core = take_factor(module, "t2", static_cast<size_t>(p * q * taps));
        const auto b = take_factor(module, "w2_b", static_cast<size_t>(q * i2));
        return product(transposed(a, p, o2), contracted(core, b, p, q, i2, taps), o2, p, i2 * taps);
    }
    const int64_t rank = dimension(module, "w2_b", 0);
    return product(take_factor(module, "w2_a", static_cast<size_t>(o2 * rank)),
                   take_factor(module, "w2_b", static_cast<size_t>(rank * i2 * taps)), o2, rank, i2 * taps);
}

} // namespace

Update lokr_update(LoraModule & module, const MatrixShape & shape) {
    Update::Kronecker k;
    k.a = take_first(module, k.o1, k.i1);
    if (shape.rows % k.o1 != 0 || shape.inputs % k.i1 != 0) {
        fail(Status::bad_file, "%s: w1 is %lldx%lld, which divides no weight of %lldx%lld",
             module.stem.c_str(), static_cast<long long>(k.o1), static_cast<long long>(k.i1),
             static_cast<long long>(shape.rows), static_cast<long long>(shape.inputs));
    }
    k.o2 = shape.rows / k.o1;
    k.i2 = shape.inputs / k.i1;
    k.b = take_second(module, k.o2, k.i2, shape.taps);
    for (float & value : k.a) {
        value *= static_cast<float>(module.scale);
    }
    k.i2 *= shape.taps; // (i2, taps) lie as one

    Update update;
    if (shape.taps == 1) {
        update.kronecker = std::move(k);
        return update;
    }
    update.dense.make = [k = std::move(k), shape](const float *, float) {
        Update whole;
        whole.shape = shape;
        whole.kronecker = k;
        return delta_of(whole, nullptr, 1.0f);
    };
    return update;
}

} // namespace sd
