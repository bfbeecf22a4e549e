#include "lora/lora_file.h"

#include "core/error.h"
#include "core/words.h"
#include "lora/lora_build.h"
#include "lora/lora_source.h"

#include <algorithm>
#include <tuple>

namespace sd {
namespace {

bool same_factors(const LoraModule & a, const LoraModule & b) {
    const auto same = [](const Factor & x, const Factor & y) {
        return x.shape == y.shape && x.data == y.data;
    };
    return a.kind == b.kind && a.scale == b.scale && a.on_input == b.on_input &&
           a.constraint == b.constraint && a.magnitude_of_columns == b.magnitude_of_columns &&
           a.magnitude.has_value() == b.magnitude.has_value() &&
           (!a.magnitude || same(*a.magnitude, *b.magnitude)) &&
           std::equal(a.factors.begin(), a.factors.end(), b.factors.begin(), b.factors.end(),
                      [&](const auto & x, const auto & y) {
                          return x.first == y.first && same(x.second, y.second);
                      });
}

// Careless merges hold one module under two spellings: the same tensors apply once, others add up.
void drop_duplicates(std::vector<LoraModule> & modules, LoraReport & report) {
    using Place = std::tuple<const Weight *, int64_t, int64_t, LoraKind>;
    std::map<Place, size_t> first;
    std::vector<LoraModule> kept;
    for (LoraModule & module : modules) {
        const LoraTarget & target = module.target;
        const auto [at, is_new] =
            first.emplace(Place{target.weight, target.first_row, target.rows, module.kind}, kept.size());
        if (is_new) {
            kept.push_back(std::move(module));
            continue;
        }
        const LoraModule & before = kept[at->second];
        const std::string both =
            printable(before.stem) + " and " + printable(module.stem) + " change the same weight";
        if (same_factors(before, module)) {
            report.warnings.push_back(both + " in the same way; applied once");
        } else {
            report.warnings.push_back(both + " in different ways; both are applied");
            kept.push_back(std::move(module));
        }
    }
    modules.swap(kept);
}

int64_t rank_of(const LoraModule & module) {
    for (const char * role : {"down", "w1_b", "w2_b", "a2"}) {
        const auto found = module.factors.find(role);
        if (found != module.factors.end()) {
            return found->second.shape[0];
        }
    }
    return 0;
}

void count_modules(LoraFile & out) {
    LoraReport & report = out.report;
    bool scaled = false;
    for (const LoraModule & module : out.modules) {
        ++report.kinds[lora_kind_name(module.kind) + std::string(module.magnitude ? " with dora" : "")];
        ++(is_text_weight(*module.target.weight) ? report.text_modules : report.unet_modules);
        for (const auto & [role, factor] : module.factors) {
            out.bytes += factor.data.size() * sizeof(float);
        }
        out.bytes += module.magnitude ? module.magnitude->data.size() * sizeof(float) : 0;
        if (const int64_t rank = rank_of(module)) {
            ++report.ranks[rank];
        }
        if (module.kind == LoraKind::low_rank || module.kind == LoraKind::loha ||
            module.kind == LoraKind::lokr || module.kind == LoraKind::glora) {
            report.scale_min = scaled ? std::min(report.scale_min, module.scale) : module.scale;
            report.scale_max = scaled ? std::max(report.scale_max, module.scale) : module.scale;
            scaled = true;
        }
    }
}

// The last two parts of a weight's path tell what it is: "attn2.to_k".
std::string short_name(const Weight & weight) {
    const size_t leaf = weight.name.rfind('.');
    const size_t dot = weight.name.rfind('.', leaf - 1);
    const size_t before =
        dot == std::string::npos || dot == 0 ? std::string::npos : weight.name.rfind('.', dot - 1);
    return weight.name.substr(before == std::string::npos ? 0 : before + 1, leaf - before - 1);
}

// Stems of the denoiser by whether this model knows them.
struct Denoiser {
    int known = 0, unknown = 0;
};

// Throws where the file was made for another model, or nothing of it can be used.
void check_fit(const LoraFile & out, const LoraFit & fit, const Denoiser & denoiser, const std::string & model) {
    const LoraReport & report = out.report;
    const int fitting = static_cast<int>(out.modules.size());
    const bool foreign = fit.other_text || fit.by_shape > fitting || denoiser.unknown > denoiser.known;
    if (fitting > 0 && !foreign) {
        return;
    }
    std::string why;
    if (fit.by_shape > 0) {
        const std::string there = fit.inputs_there > 0 ? text("takes %lld inputs here, %lld there",
                                                              static_cast<long long>(fit.inputs_there),
                                                              static_cast<long long>(form_of(*fit.weight).in))
                                                       : fit.first;
        why = short_name(*fit.weight) + " " + there;
    } else if (!report.unmatched.empty()) {
        why = text("%s of its keys mean nothing there, first %s", grouped(report.unmatched.size()).c_str(),
                   report.unmatched[0].c_str());
    } else if (!report.skipped.empty()) {
        fail(Status::bad_file, "%s: none of its %s modules can be used, first %s", report.path.c_str(),
             grouped(report.skipped.size()).c_str(), report.skipped[0].c_str());
    } else if (!report.absent.empty()) {
        why = "it changes only components that are not there, first " + report.absent[0];
    } else {
        why = "it holds no update";
    }
    const std::string & made_for = report.base_model;
    if (made_for.empty() || made_for == model) {
        fail(Status::bad_file, "%s: does not fit this %s model (%s)", report.path.c_str(), model.c_str(),
             why.c_str());
    }
    fail(Status::bad_file, "%s: made for %s, but the model is %s (%s)", report.path.c_str(), made_for.c_str(),
         model.c_str(), why.c_str());
}

} // namespace

LoraFile read_lora(const std::string & path, const LoraNames & names, const std::string & model) {
    LoraFile out;
    LoraReport & report = out.report;
    const LoraSource source(path, report, true);
    LoraBuilder builder(names, source.config, source.flags_ia3, report);
    Denoiser denoiser;
    for (const auto & [stem, group] : source.groups) {
        const size_t before = out.modules.size();
        const bool known = builder.add(group, out.modules);
        const bool absent = !known && names.lacks_component(stem);
        if (!known) {
            for (const LoraGroup::Member & member : group.members) {
                (absent ? report.absent : report.unmatched).push_back(printable(member.tensor->name));
            }
        }
        if (!absent && LoraNames::is_denoiser_stem(stem)) {
            ++(known ? denoiser.known : denoiser.unknown);
        }
        if (out.modules.size() > before) {
            report.applied.push_back(printable(stem));
            report.formats[format_of(group)] += static_cast<int>(out.modules.size() - before);
        }
    }
    builder.finish();
    check_fit(out, builder.fit(), denoiser, model);
    drop_duplicates(out.modules, report);
    count_modules(out);
    return out;
}

} // namespace sd
