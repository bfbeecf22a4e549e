// Updates that are products of small factors: LoRA, LoHa, LoKr and GLoRA.
#include "lora/lora_build.h"

#include "core/error.h"

#include <utility>

namespace sd {
namespace {

Factor transposed(const Factor & from) {
    const int64_t rows = from.shape[0], columns = from.shape[1];
    Factor out{{columns, rows}, std::vector<float>(from.data.size())};
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t column = 0; column < columns; ++column) {
            out.data[column * rows + row] = from.data[row * columns + column];
        }
    }
    return out;
}

void flatten_kernel(Factor & factor) {
    factor.shape = {factor.shape[0], element_count(factor.shape) / factor.shape[0]};
}

} // namespace

void LoraBuilder::add_low_rank(const LoraGroup & group, const LoraTarget & target,
                               const std::string & spelling, Modules & out) {
    const StoredTensor & down = need(group.find(LoraRole::down, spelling), "down");
    const StoredTensor & up = need(group.find(LoraRole::up, spelling), "up");
    const StoredTensor * mid = group.find(LoraRole::mid, spelling);
    const WeightForm form = matrix_form_at(target);
    const int64_t rank = matrix_shape(down)[0];
    check_rank(group, rank, form);

    LoraModule module = begin(group, target, LoraKind::low_rank);
    int64_t padded = 0;
    const int64_t wide = control_inputs(*target.weight);
    if (wide > 0 && matrix_shape(down)[1] == wide) {
        module.inputs = padded = wide;
        module.factors["down"] = read_exactly(down, {rank, wide}, "down");
    } else {
        module.factors["down"] =
            read_inputs(down, form, !mid, "down", is_input_embedding(*target.weight) ? &padded : nullptr);
    }
    module.factors["up"] = read_exactly(up, {form.out, rank}, "up");
    if (mid) {
        module.factors["mid"] = read_exactly(need(mid, "mid"), {rank, rank, form.kh, form.kw}, "mid");
    }
    module.scale = scale(group, rank);
    add_magnitude(group, spelling.compare(0, 7, "lora_A.") == 0 ? spelling.substr(6) : "", module, padded);
    if (module.inputs > 0) {
        warn(text("takes %lld input features, %lld of them of a picture to follow: it needs a control_image",
                  static_cast<long long>(wide), static_cast<long long>(wide - form.in)),
             group.stem);
    } else {
        note_padding(group, padded, form);
    }
    out.push_back(std::move(module));
}

// The embedding lies as (vocabulary, width), its factors as of the transposed matrix.
void LoraBuilder::add_embedding(const LoraGroup & group, const LoraTarget & target,
                                const std::string & spelling, Modules & out) {
    const StoredTensor & a = need(group.find(LoraRole::embedding_down, spelling), "lora_embedding_A");
    const StoredTensor & b = need(group.find(LoraRole::embedding_up, spelling), "lora_embedding_B");
    const WeightForm form = matrix_form_at(target);
    if (form.taps() > 1) {
        throw Misfit{"is of a table of embeddings, where the model has a convolution", true};
    }
    const int64_t rank = matrix_shape(a)[0];
    check_rank(group, rank, form);
    LoraModule module = begin(group, target, LoraKind::low_rank);
    module.factors["up"] = transposed(read_exactly(a, {rank, form.out}, "lora_embedding_A"));
    module.factors["down"] = transposed(read_exactly(b, {form.in, rank}, "lora_embedding_B"));
    module.scale = scale(group, rank);
    out.push_back(std::move(module));
}

void LoraBuilder::add_up_bias(const LoraGroup & group, const LoraTarget & target,
                              const std::string & spelling, Modules & out) {
    const StoredTensor & down = need(group.find(LoraRole::down, spelling), "down");
    const StoredTensor & bias = need(group.find(LoraRole::up_bias, spelling), "bias");
    LoraModule module = begin(group, target, LoraKind::dense);
    module.factors["diff"] = read_vector(bias, target.rows, "bias");
    module.scale = scale(group, matrix_shape(down)[0]);
    out.push_back(std::move(module));
}

void LoraBuilder::add_loha(const LoraGroup & group, const LoraTarget & target, Modules & out) {
    const WeightForm form = matrix_form_at(target);
    const StoredTensor * cores[] = {group.find(LoraRole::hada_t1), group.find(LoraRole::hada_t2)};
    const bool tucker = cores[0] || cores[1];
    const LoraRole a_roles[] = {LoraRole::hada_w1_a, LoraRole::hada_w2_a};
    const LoraRole b_roles[] = {LoraRole::hada_w1_b, LoraRole::hada_w2_b};
    LoraModule module = begin(group, target, LoraKind::loha);
    int64_t padded = 0;
    for (int i = 0; i < 2; ++i) {
        const std::string number = std::to_string(i + 1), w = "w" + number;
        const StoredTensor & a = need(group.find(a_roles[i]), ("hada_" + w + "_a").c_str());
        const StoredTensor & b = need(group.find(b_roles[i]), ("hada_" + w + "_b").c_str());
        const int64_t rank = matrix_shape(b)[0];
        check_rank(group, rank, form);
        Factor & b_factor = module.factors[w + "_b"] =
            read_inputs(b, form, !tucker, ("hada_" + w + "_b").c_str(),
                        is_input_embedding(*target.weight) ? &padded : nullptr);
        flatten_kernel(b_factor);
        const std::vector<int64_t> a_shape =
            tucker ? std::vector<int64_t>{rank, form.out} : std::vector<int64_t>{form.out, rank};
        module.factors[w + "_a"] = read_exactly(a, a_shape, ("hada_" + w + "_a").c_str());
        if (tucker) {
            module.factors["t" + number] =
                read_exactly(need(cores[i], ("hada_t" + number).c_str()), {rank, rank, form.kh, form.kw},
                             ("hada_t" + number).c_str());
        }
    }
    module.scale = scale(group, module.factors["w1_b"].shape[0]);
    add_magnitude(group, "", module, padded);
    note_padding(group, padded, form);
    out.push_back(std::move(module));
}

void LoraBuilder::add_lokr(const LoraGroup & group, const LoraTarget & target, Modules & out) {
    const WeightForm form = matrix_form_at(target);
    const StoredTensor * w1 = group.find(LoraRole::lokr_w1);
    const StoredTensor * w2 = group.find(LoraRole::lokr_w2);
    const StoredTensor * w1_a = w1 ? nullptr : &need(group.find(LoraRole::lokr_w1_a), "lokr_w1");
    const StoredTensor * w1_b = w1 ? nullptr : &need(group.find(LoraRole::lokr_w1_b), "lokr_w1_b");
    const StoredTensor * w2_a = w2 ? nullptr : &need(group.find(LoraRole::lokr_w2_a), "lokr_w2");
    const StoredTensor * w2_b = w2 ? nullptr : &need(group.find(LoraRole::lokr_w2_b), "lokr_w2_b");
    const StoredTensor * core = w2 ? nullptr : group.find(LoraRole::lokr_t2);
    need(w1 ? w1 : w1_a, "lokr_w1");
    need(w2 ? w2 : w2_a, "lokr_w2");

    // The sizes of both factors; their products have to be the weight's. Nothing says which is the larger.
    const std::vector<int64_t> left = matrix_shape(w1 ? *w1 : *w1_a), inner = matrix_shape(w1 ? *w1 : *w1_b);
    const std::vector<int64_t> right = matrix_shape(w2 ? *w2 : *w2_a),
                               right_inner = matrix_shape(w2 ? *w2 : *w2_b);
    const bool unfolded = right_inner.size() == 2 && !core; // kernels lie in the columns
    const int64_t o1 = left[0], i1 = inner[1], o2 = core ? right[1] : right[0];
    const int64_t i2 = unfolded ? right_inner[1] / form.taps() : right_inner[1];
    const auto is_product = [](int64_t a, int64_t b, int64_t of) { return of % a == 0 && of / a == b; };
    if (!is_product(o1, o2, form.out) || !is_product(i1, i2, form.in) ||
        (unfolded && right_inner[1] % form.taps() != 0)) {
        throw Misfit{text("is the product of %lldx%lld and %lldx%lld, where the weight is %lldx%lld",
                          static_cast<long long>(o1), static_cast<long long>(i1), static_cast<long long>(o2),
                          static_cast<long long>(i2), static_cast<long long>(form.out),
                          static_cast<long long>(form.in)),
                     true};
    }
    const WeightForm second{o2, i2, form.kh, form.kw};
    LoraModule module = begin(group, target, LoraKind::lokr);
    int64_t rank = 0;
    if (w1) {
        module.factors["w1"] = read_exactly(*w1, {o1, i1}, "lokr_w1");
    } else {
        rank = inner[0];
        module.factors["w1_a"] = read_exactly(*w1_a, {o1, rank}, "lokr_w1_a");
        module.factors["w1_b"] = read_exactly(*w1_b, {rank, i1}, "lokr_w1_b");
    }
    if (w2) {
        module.factors["w2"] = read_inputs(*w2, second, true, "lokr_w2", nullptr);
    } else {
        rank = right_inner[0];
        const std::vector<int64_t> a_shape =
            core ? std::vector<int64_t>{rank, o2} : std::vector<int64_t>{o2, rank};
        module.factors["w2_a"] = read_exactly(*w2_a, a_shape, "lokr_w2_a");
        Factor & b_factor = module.factors["w2_b"] = read_inputs(*w2_b, second, !core, "lokr_w2_b", nullptr);
        flatten_kernel(b_factor);
        if (core) {
            module.factors["t2"] =
                read_exactly(need(core, "lokr_t2"), {rank, rank, form.kh, form.kw}, "lokr_t2");
        }
    }
    check_rank(group, rank, form);
    module.scale = scale(group, rank);
    add_magnitude(group, "", module, 0);
    out.push_back(std::move(module));
}

// Early files have both pairs the other way round: b2 b1 + (W a2) a1.
void LoraBuilder::add_glora(const LoraGroup & group, const LoraTarget & target, Modules & out) {
    const WeightForm form = matrix_form_at(target);
    const StoredTensor * a1 = &need(group.find(LoraRole::a1), "a1");
    const StoredTensor * a2 = &need(group.find(LoraRole::a2), "a2");
    const StoredTensor * b1 = &need(group.find(LoraRole::b1), "b1");
    const StoredTensor * b2 = &need(group.find(LoraRole::b2), "b2");
    const auto side = [](const StoredTensor * tensor, int i) { return matrix_shape(*tensor)[i]; };
    const int64_t old_rank = side(a1, 0), new_rank = side(a1, 1);
    const bool is_old = side(a2, 1) == old_rank && side(b1, 0) == old_rank && side(b2, 1) == old_rank;
    const bool is_new = side(a2, 0) == new_rank && side(b1, 1) == new_rank && side(b2, 0) == new_rank;
    // Both readings fit every square weight; the one whose rank is the weight's side is the wrong one.
    if (is_old && (!is_new || new_rank == form.in)) {
        std::swap(a1, a2);
        std::swap(b1, b2);
    }
    const int64_t rank = side(a1, 1);
    const StoredTensor * mid = group.find(LoraRole::bm);
    check_rank(group, rank, form);
    LoraModule module = begin(group, target, LoraKind::glora);
    module.factors["a1"] = read_exactly(*a1, {form.in, rank}, "a1");
    module.factors["a2"] = read_exactly(*a2, {rank, form.in}, "a2");
    module.factors["b1"] = read_exactly(*b1, {form.out, rank}, "b1");
    module.factors["b2"] = read_inputs(*b2, form, !mid, "b2", nullptr);
    if (module.factors["b2"].shape[0] != rank) {
        throw Misfit{"its factors are of several ranks", true};
    }
    if (mid) {
        module.factors["bm"] = read_exactly(need(mid, "bm"), {rank, rank, form.kh, form.kw}, "bm");
    }
    module.scale = scale(group, rank);
    add_magnitude(group, "", module, 0);
    out.push_back(std::move(module));
}

} // namespace sd
