#include "lora/lora_config.h"

#include "core/words.h"

#include <algorithm>
#include <cmath>

namespace sd {

static constexpr Json::Limits CONFIG_LIMITS = {16u << 20, 1u << 19, 64};

LoraConfig::LoraConfig(const std::map<std::string, std::string> & metadata,
                       const std::string & adapter_config, const std::string & path) {
    const auto written = metadata.find("lora_adapter_metadata");
    if (written != metadata.end()) {
        read(Json::parse(written->second, path + " (lora_adapter_metadata)", CONFIG_LIMITS));
    }
    if (!adapter_config.empty()) {
        read(Json::parse(adapter_config, path + " (adapter_config.json)", CONFIG_LIMITS));
    }
    const auto llama = metadata.find("adapter.lora.alpha"); // llama.cpp's adapters, GGUF
    if (llama != metadata.end()) {
        const Json number = Json::parse(llama->second, path + " (adapter.lora.alpha)", CONFIG_LIMITS);
        read_member(components_[""], "lora_alpha", number);
    }
}

// Pipelines write all components into one object, each name behind its component's.
void LoraConfig::read(const Json & config) {
    if (!config.object()) {
        return;
    }
    for (const JsonMember & member : *config.object()) {
        const size_t dot = member.name.find('.');
        if (dot == std::string::npos) {
            read_member(components_[""], member.name, member.value);
        } else {
            read_member(components_[member.name.substr(0, dot)], member.name.substr(dot + 1), member.value);
        }
    }
}

void LoraConfig::read_member(Component & component, const std::string & name, const Json & value) {
    const std::optional<double> number = value.number();
    const bool is_finite = number && std::isfinite(*number);
    if (name == "r" && is_finite && *number > 0) {
        component.rank = number;
    } else if ((name == "lora_alpha" || name == "alpha") && is_finite) { // LoHa's and LoKr's is called alpha
        component.alpha = number;
    } else if (name == "rank_pattern") {
        component.ranks = read_patterns(value);
    } else if (name == "alpha_pattern") {
        component.alphas = read_patterns(value);
    } else if (name == "use_rslora") {
        component.root_of_rank = value.boolean().value_or(false);
    } else if (name == "feedforward_modules" && value.array()) {
        feedforward_.emplace();
        for (const Json & module : *value.array()) {
            if (module.string()) {
                feedforward_->push_back(*module.string());
            }
        }
    } else if (name == "use_cayley_neumann") {
        uses_series_ = value.boolean().value_or(true);
    } else if (name == "num_cayley_neumann_terms" && is_finite && *number >= 1 && *number <= 64) {
        cayley_terms_ = static_cast<int>(*number);
    }
}

std::optional<bool> LoraConfig::is_feedforward(const std::string & stem) const {
    if (!feedforward_) {
        return std::nullopt;
    }
    return std::any_of(feedforward_->begin(), feedforward_->end(), [&](const std::string & end) {
        const size_t before = stem.size() - std::min(stem.size(), end.size());
        return stem.compare(before, std::string::npos, end) == 0 && (before == 0 || stem[before - 1] == '.');
    });
}

LoraConfig::Patterns LoraConfig::read_patterns(const Json & value) {
    Patterns out;
    if (!value.object()) {
        return out;
    }
    std::vector<const JsonMember *> members(value.object()->size()); // the first that matches counts
    for (const JsonMember & member : *value.object()) {
        members[member.place] = &member;
    }
    for (const JsonMember * each : members) {
        const JsonMember & member = *each;
        const std::optional<double> number = member.value.number();
        if (!number || !std::isfinite(*number)) {
            continue;
        }
        if (member.name.find_first_of("()[]{}|") != std::string::npos) {
            warnings_.push_back("the pattern '" + printable(member.name) +
                                "' of its config is not understood here");
        } else {
            out.emplace_back(member.name, *number);
        }
    }
    return out;
}

std::optional<double> LoraConfig::first_match(const Patterns & patterns, const std::string & module) {
    for (const auto & [pattern, number] : patterns) {
        if (pattern_matches(pattern, module)) {
            return number;
        }
    }
    return std::nullopt;
}

std::optional<double> LoraConfig::scale(const std::string & stem, int64_t rank, bool & other_rank) const {
    const size_t dot = stem.find('.');
    auto found = components_.find(stem.substr(0, dot));
    std::string module = dot == std::string::npos ? "" : stem.substr(dot + 1);
    if (found == components_.end()) {
        found = components_.find("");
        module = stem;
    }
    if (found == components_.end()) {
        return std::nullopt;
    }
    const Component & component = found->second;
    const std::optional<double> special_rank = first_match(component.ranks, module);
    const std::optional<double> special_alpha = first_match(component.alphas, module);
    const std::optional<double> stated = special_rank ? special_rank : component.rank;
    const std::optional<double> alpha = special_alpha ? special_alpha : component.alpha;
    const double r = rank > 0 ? static_cast<double>(rank) : stated.value_or(0);
    other_rank = stated && rank > 0 && *stated != r;
    if (!alpha || r <= 0) {
        return std::nullopt;
    }
    return *alpha / (component.root_of_rank ? std::sqrt(r) : r);
}

} // namespace sd
