// Updates without a rank: whole differences and values, IA3, and rotations.
#include "lora/lora_build.h"

#include "core/error.h"

#include <cmath>
#include <utility>

namespace sd {

// A difference to the whole weight, or its new value.
void LoraBuilder::add_whole(const LoraGroup & group, const LoraTarget & target, LoraRole role, LoraKind kind,
                            Modules & out) {
    const StoredTensor & value = need(group.find(role), kind == LoraKind::dense ? "diff" : "value");
    const WeightForm form = form_at(target);
    LoraModule module = begin(group, target, kind);
    int64_t padded = 0;
    if (form.is_vector()) {
        module.factors["diff"] = read_vector(value, form.out, "diff");
    } else {
        const bool may_pad = kind == LoraKind::dense && is_input_embedding(*target.weight);
        if (matrix_shape(value)[0] != form.out) {
            throw Misfit{text("is %s, where the weight has %lld rows",
                              shape_words(matrix_shape(value)).c_str(), static_cast<long long>(form.out)),
                         true};
        }
        module.factors["diff"] = read_inputs(value, form, true, "diff", may_pad ? &padded : nullptr);
    }
    if (kind == LoraKind::dense && role == LoraRole::diff) {
        add_magnitude(group, "", module, padded);
    }
    note_padding(group, padded, form);
    out.push_back(std::move(module));
}

void LoraBuilder::add_ia3(const LoraGroup & group, const LoraTarget & target, Modules & out) {
    const WeightForm form = matrix_form_at(target);
    const StoredTensor * on_input = group.find(LoraRole::on_input);
    const StoredTensor * factor = group.find(LoraRole::ia3_factor);
    const StoredTensor & values = need(factor ? factor : group.find(LoraRole::weight), "weight");
    if (!factor && !on_input && !flags_ia3_) {
        throw Misfit{text("its weight is %s, where the model's is %lldx%lld, and nothing says that it is IA3",
                          shape_words(matrix_shape(values)).c_str(), static_cast<long long>(form.out),
                          static_cast<long long>(form.in)),
                     true};
    }
    const int64_t n = count(values.ne);
    const bool lies_along_rows = matrix_shape(values)[0] == n;
    LoraModule module = begin(group, target, LoraKind::ia3);
    if (on_input) {
        module.on_input = scalar_of(*on_input) != 0;
    } else if (factor && values.dims == 2) {
        module.on_input = !lies_along_rows;
    } else if (const std::optional<bool> feedforward = config_.is_feedforward(group.stem)) {
        module.on_input = *feedforward;
    } else if (n == form.in && n == form.out) {
        throw Misfit{"does not say whether it scales inputs or outputs"};
    } else {
        module.on_input = n == form.in;
    }
    Factor & weight = module.factors["weight"] =
        read_vector(values, module.on_input ? form.in : form.out, "weight");
    if (factor) { // of W itself, where LyCORIS' is of what is added to it
        for (float & value : weight.data) {
            value -= 1;
        }
    }
    out.push_back(std::move(module));
}

void LoraBuilder::add_oft(const LoraGroup & group, const LoraTarget & whole, const LoraGroup::Member & member,
                          Modules & out) {
    LoraTarget target = whole;
    if (member.key.part >= 0) {
        const std::vector<WeightPart> & parts = whole.weight->parts;
        if (member.key.part >= static_cast<int>(parts.size())) {
            throw Misfit{text("rotates part %d of a weight that has %zu", member.key.part, parts.size()),
                         true};
        }
        target.first_row = parts[member.key.part].first_row;
        target.rows = parts[member.key.part].rows;
    }
    const StoredTensor & blocks = need(member.tensor, "oft_blocks");
    const WeightForm form = matrix_form_at(target);
    const int64_t b = blocks.ne[0], n = blocks.ne[2], stages = blocks.ne[3];
    const bool butterfly = blocks.dims == 4;
    bool fits = blocks.dims <= 4 && blocks.ne[1] == b && form.out % b == 0 && form.out / b == n;
    for (int64_t stage = 0; butterfly && fits && stage < stages;
         ++stage) { // it swaps halves of blocks 2^stage apart
        fits = stages < 32 && b % 2 == 0 && form.out % (b << stage) == 0;
    }
    if (!fits) {
        throw Misfit{text("its oft_blocks are %s, which do not rotate %lld rows",
                          shape_words(matrix_shape(blocks)).c_str(), static_cast<long long>(form.out)),
                     true};
    }
    LoraModule module = begin(group, target, butterfly ? LoraKind::boft : LoraKind::oft);
    module.factors["blocks"] = read_factor(blocks, butterfly ? std::vector<int64_t>{stages, n, b, b}
                                                             : std::vector<int64_t>{n, b, b});
    if (const StoredTensor * rescale = group.find(LoraRole::rescale)) {
        module.factors["rescale"] = read_vector(*rescale, form.out, "rescale");
    }
    if (const StoredTensor * alpha = group.find(LoraRole::alpha)) {
        const double limit = scalar_of(*alpha);
        if (!std::isfinite(limit)) {
            throw Misfit{"its alpha is no finite number"};
        }
        // LyCORIS takes 0 for no limit; for sd-scripts it is one, which leaves nothing of the rotation.
        if (limit > 0 || group.stem.compare(0, 4, "oft_") == 0) {
            module.constraint = limit * static_cast<double>(form.out);
        }
    }
    out.push_back(std::move(module));
}

void LoraBuilder::add_oft_input(const LoraGroup & group, const LoraTarget & target, Modules & out) {
    const StoredTensor & rotation = need(group.find(LoraRole::oft_rotation), "oft_R");
    const WeightForm form = matrix_form_at(target);
    const std::vector<int64_t> shape = matrix_shape(rotation);
    const int64_t entries = shape[1], inputs = form.in * form.taps();
    const int64_t b =
        static_cast<int64_t>(std::lround((1 + std::sqrt(1 + 8.0 * static_cast<double>(entries))) / 2));
    const bool shared = shape[0] == 1; // one block for all
    if (shape.size() != 2 || b * (b - 1) / 2 != entries || inputs % b != 0 ||
        (!shared && shape[0] != inputs / b)) {
        throw Misfit{text("its oft_R is %s, which does not rotate %lld inputs", shape_words(shape).c_str(),
                          static_cast<long long>(inputs)),
                     true};
    }
    LoraModule module = begin(group, target, LoraKind::oft_input);
    Factor factor = read_factor(rotation, shape);
    const auto one = factor.data;
    for (; factor.shape[0] < inputs / b; ++factor.shape[0]) {
        factor.data.insert(factor.data.end(), one.begin(), one.end());
    }
    module.factors["rotation"] = std::move(factor);
    module.cayley_terms = config_.cayley_terms();
    out.push_back(std::move(module));
}

} // namespace sd
