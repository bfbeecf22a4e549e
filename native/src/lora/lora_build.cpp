#include "lora/lora_build.h"

#include "core/affix.h"
#include "core/error.h"
#include "core/words.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <string_view>

namespace sd {

static constexpr int64_t HIGHEST_RANK = 4096;

const StoredTensor * LoraGroup::find(LoraRole role, const std::string & spelling) const {
    for (const Member & member : members) {
        if (member.key.role == role && (spelling.empty() || member.key.spelling == spelling)) {
            return member.tensor;
        }
    }
    return nullptr;
}

bool LoraGroup::has_update() const {
    return std::any_of(members.begin(), members.end(), [](const Member & member) {
        return member.key.role != LoraRole::alpha && member.key.role != LoraRole::scale &&
               member.key.role != LoraRole::scalar && member.key.role != LoraRole::known;
    });
}

template <typename Build>
void LoraBuilder::attempt(const LoraGroup & group, const LoraTarget * target, Build build) {
    try {
        if (!target) {
            throw Misfit{"the module has no such parameter in this model"};
        }
        build(*target);
    } catch (const Misfit & misfit) {
        report_.skipped.push_back(printable(group.stem) + ": " + misfit.why);
        if (!misfit.by_shape) {
            return;
        }
        const bool reads_text =
            misfit.inputs_there > 0 && (ends_with(target->weight->name, ".attn2.to_k.weight") ||
                                        ends_with(target->weight->name, ".attn2.to_v.weight"));
        if (fit_.by_shape++ == 0 || (reads_text && !fit_.other_text)) {
            fit_.weight = target->weight;
            fit_.inputs_there = misfit.inputs_there;
            fit_.first = misfit.why;
        }
        fit_.other_text = fit_.other_text || reads_text;
    }
}

bool LoraBuilder::add(const LoraGroup & group, std::vector<LoraModule> & modules) {
    const std::vector<LoraTarget> weights = names_.find(group.stem, "weight");
    const std::vector<LoraTarget> biases = names_.find(group.stem, "bias");
    if (weights.empty() && biases.empty()) {
        return false;
    }
    const LoraTarget * weight = weights.empty() ? nullptr : &weights[0];
    const LoraTarget * bias = biases.empty() ? nullptr : &biases[0];
    const auto on = [&](const LoraTarget * target, auto method, auto... more) {
        attempt(group, target,
                [&](const LoraTarget & found) { (this->*method)(group, found, more..., modules); });
    };
    const size_t before = report_.skipped.size() + modules.size();

    std::set<std::pair<LoraRole, std::string>> done; // pairs have several members
    for (const LoraGroup::Member & member : group.members) {
        const std::string & spelling = member.key.spelling;
        const auto first_of = [&](LoraRole kind) { return done.emplace(kind, spelling).second; };
        switch (member.key.role) {
        case LoraRole::down:
        case LoraRole::up:
        case LoraRole::mid:
            if (first_of(LoraRole::down)) {
                on(weight, &LoraBuilder::add_low_rank, spelling);
            }
            break;
        case LoraRole::up_bias:
            on(bias, &LoraBuilder::add_up_bias, spelling);
            break;
        case LoraRole::embedding_down:
        case LoraRole::embedding_up:
            if (first_of(LoraRole::embedding_down)) {
                on(weight, &LoraBuilder::add_embedding, spelling);
            }
            break;
        case LoraRole::hada_w1_a:
        case LoraRole::hada_w1_b:
        case LoraRole::hada_w2_a:
        case LoraRole::hada_w2_b:
        case LoraRole::hada_t1:
        case LoraRole::hada_t2:
            if (done.emplace(LoraRole::hada_w1_a, "").second) {
                on(weight, &LoraBuilder::add_loha);
            }
            break;
        case LoraRole::lokr_w1:
        case LoraRole::lokr_w1_a:
        case LoraRole::lokr_w1_b:
        case LoraRole::lokr_w2:
        case LoraRole::lokr_w2_a:
        case LoraRole::lokr_w2_b:
        case LoraRole::lokr_t2:
            if (done.emplace(LoraRole::lokr_w1, "").second) {
                on(weight, &LoraBuilder::add_lokr);
            }
            break;
        case LoraRole::a1:
        case LoraRole::a2:
        case LoraRole::b1:
        case LoraRole::b2:
        case LoraRole::bm:
            if (done.emplace(LoraRole::a1, "").second) {
                on(weight, &LoraBuilder::add_glora);
            }
            break;
        case LoraRole::diff:
            on(weight, &LoraBuilder::add_whole, LoraRole::diff, LoraKind::dense);
            break;
        case LoraRole::diff_bias:
            on(bias, &LoraBuilder::add_whole, LoraRole::diff_bias, LoraKind::dense);
            break;
        case LoraRole::set_weight:
            on(weight, &LoraBuilder::add_whole, LoraRole::set_weight, LoraKind::replace);
            break;
        case LoraRole::bias:
            on(bias, &LoraBuilder::add_whole, LoraRole::bias, LoraKind::replace);
            break;
        case LoraRole::weight:
            if (!group.find(LoraRole::on_input) && weight &&
                count(member.tensor->ne) == count(weight->weight->ne)) {
                on(weight, &LoraBuilder::add_whole, LoraRole::weight, LoraKind::replace);
            } else {
                on(weight, &LoraBuilder::add_ia3);
            }
            break;
        case LoraRole::ia3_factor: {
            const size_t modules_before = modules.size();
            on(weight, &LoraBuilder::add_ia3);
            if (bias && modules.size() > modules_before &&
                !modules.back().on_input) { // PEFT's scales all of the output
                modules.push_back(modules.back());
                modules.back().target = *bias;
            }
            break;
        }
        case LoraRole::oft_blocks:
            on(weight, &LoraBuilder::add_oft, member);
            break;
        case LoraRole::oft_rotation:
            on(weight, &LoraBuilder::add_oft_input);
            break;
        case LoraRole::scale: // alone it is a norm's parameter, as BFL's control LoRAs have them
            if (!group.has_update() && weight) {
                on(weight, &LoraBuilder::add_whole, LoraRole::scale, LoraKind::replace);
            }
            break;
        case LoraRole::unreadable:
            attempt(group, weight, [&](const LoraTarget &) {
                throw Misfit{
                    text("'%s' is of a kind that is not read here", printable(member.tensor->name).c_str())};
            });
            break;
        default:
            break;
        }
    }
    if (report_.skipped.size() + modules.size() == before) {
        report_.skipped.push_back(printable(group.stem) + ": nothing of it is an update");
    }
    return true;
}

LoraModule LoraBuilder::begin(const LoraGroup & group, const LoraTarget & target, LoraKind kind) const {
    LoraModule out;
    out.stem = group.stem;
    out.target = target;
    out.kind = kind;
    return out;
}

// `.scale`, else `.alpha` by the rank, else the config, else 1. Rank 0 stands for a module that has none:
// then alpha means nothing.
double LoraBuilder::scale(const LoraGroup & group, int64_t rank) {
    const auto number = [&](LoraRole role, const char * name) -> std::optional<double> {
        const StoredTensor * tensor = group.find(role);
        if (!tensor) {
            return std::nullopt;
        }
        const double out = scalar_of(*tensor);
        if (!std::isfinite(out)) {
            throw Misfit{text("its %s is no finite number", name)};
        }
        return out;
    };
    bool other_rank = false;
    const std::optional<double> explicit_scale = number(LoraRole::scale, "scale"),
                                alpha = number(LoraRole::alpha, "alpha");
    const std::optional<double> by_config = config_.scale(group.stem, rank, other_rank);
    double out = 1;
    if (explicit_scale) {
        out = *explicit_scale;
    } else if (alpha) {
        out = rank > 0 ? *alpha / static_cast<double>(rank) : 1;
        if (by_config) {
            warn("has an alpha both as a tensor and in its metadata; the tensor counts", group.stem);
        }
    } else if (by_config) {
        out = *by_config;
        if (other_rank) {
            warn("has another rank than its config states; the tensors' counts", group.stem);
        }
    }
    if (out == 0 && !explicit_scale) {
        warn("has an alpha of 0, which trainers write for 'unset'; read as the rank", group.stem);
        out = 1;
    }
    out *= number(LoraRole::scalar, "scalar").value_or(1);
    if (!std::isfinite(static_cast<float>(out))) {
        throw Misfit{text("its scale is %g, which is more than 32 bits hold", out)};
    }
    return out;
}

void LoraBuilder::add_magnitude(const LoraGroup & group, const std::string & name, LoraModule & module,
                                int64_t padded) {
    const StoredTensor * of_rows = group.find(LoraRole::magnitude_of_rows, name);
    const StoredTensor * tensor = of_rows ? of_rows : group.find(LoraRole::magnitude);
    if (!tensor) {
        return;
    }
    if (padded > 0) {
        throw Misfit{"DoRA states no norm for the inputs that the file lacks", true};
    }
    const WeightForm form = form_at(module.target);
    const std::vector<int64_t> shape = matrix_shape(*tensor);
    const int64_t n = count(tensor->ne);
    const bool lies_along_inputs = shape[0] == 1 && n == form.in && (tensor->dims > 1 || n != form.out);
    module.magnitude_of_columns = !of_rows && lies_along_inputs;
    module.magnitude = read_vector(*tensor, module.magnitude_of_columns ? form.in : form.out, "magnitude");
}

void LoraBuilder::check_rank(const LoraGroup & group, int64_t rank, const WeightForm & form) {
    if (rank > HIGHEST_RANK) {
        fail(Status::unsupported, "%s: %s has rank %lld, where %lld is the highest that is read here",
             report_.path.c_str(), printable(group.stem).c_str(), static_cast<long long>(rank),
             static_cast<long long>(HIGHEST_RANK));
    }
    if (rank > std::min(form.out, form.in * form.taps())) {
        warn("has a rank above its weight's own", group.stem);
    }
}

void LoraBuilder::warn(const std::string & sentence, const std::string & stem) {
    auto & [modules, first] = warnings_[sentence];
    if (modules++ == 0) {
        first = stem;
    }
}

void LoraBuilder::note_padding(const LoraGroup & group, int64_t padded, const WeightForm & form) {
    if (padded > 0) {
        report_.padded.push_back(text("%s: %lld of %lld input features", printable(group.stem).c_str(),
                                      static_cast<long long>(padded), static_cast<long long>(form.in)));
    }
}

void LoraBuilder::finish() {
    for (const auto & [sentence, about] : warnings_) {
        const std::string more = about.first > 1 ? text(" (so do %d more)", about.first - 1) : "";
        report_.warnings.push_back(printable(about.second) + " " + sentence + more);
    }
}

} // namespace sd
