#include "families/distilled.h"

#include "core/error.h"

#include <algorithm>
#include <cstdlib>
#include <filesystem>

namespace sd {
namespace {

struct Distilled {
    const char * mark; // in the words of the name
    const char * name;
    bool         is_a_word; // that LoRAs of other things have as well: theirs has to tell of a model or steps, too
    Defaults     defaults;
};

// As their authors say; guidance is part of what was distilled.
constexpr Distilled KINDS[] = {
    {"lightning", "Lightning", true, {4, 1.0f, "euler", "simple", 0}}, // Lin et al., 2024, https://arxiv.org/abs/2402.13929
    {" hyper sd", "Hyper", false, {8, 1.0f, "euler", "simple", 0}},     // Ren et al., 2024, https://arxiv.org/abs/2404.13686
    {"turbo", "Turbo", true, {4, 1.0f, "euler_a", "simple", 0}},       // Sauer et al., 2023, https://arxiv.org/abs/2311.17042
    {" dmd2 ", "DMD2", false, {4, 1.0f, "lcm", "simple", 0}},           // Yin et al., 2024, https://arxiv.org/abs/2405.14867
    {" tcd ", "TCD", false, {4, 1.0f, "tcd", "simple", 0}},             // Zheng et al., 2024, https://arxiv.org/abs/2402.19159
    {" lcm ", "LCM", false, {4, 1.0f, "lcm", "simple", 0}},             // Luo et al., 2023, https://arxiv.org/abs/2310.04378
};

// LoRAs for rectified flows, which keep the model's sampler and guidance: FLUX.1-Turbo-Alpha and Hyper-FLUX, Hyper-SD3.
struct DistilledFlow {
    const char * mark;
    const char * name;
    int          steps;
    double       multiplier;
};
constexpr DistilledFlow FLOWS[] = {
    {"turbo", "Turbo", 8, 1},
    {" hyper ", "Hyper", 8, 0.125},
};

constexpr const char * MODELS[] = {" sd", "xl ", "xl1", " flux"};

constexpr int most_steps = 16; // that a name can mean

// Small letters and digits; around words, whatever stood there, is one space.
std::string words_of(const std::string & path) {
    std::filesystem::path at = std::filesystem::u8path(path);
    at = at.has_filename() ? at : at.parent_path();
    std::string out = " ";
    for (const char c : at.filename().u8string()) {
        const bool capital = c >= 'A' && c <= 'Z', small = c >= 'a' && c <= 'z', digit = c >= '0' && c <= '9';
        if (capital || small || digit) {
            out += capital ? static_cast<char>(c - 'A' + 'a') : c;
        } else if (out.back() != ' ') {
            out += ' ';
        }
    }
    return out + ' ';
}

// The number before "step" or "steps"; 0 where there is none.
int steps_of(const std::string & words) {
    size_t end = words.find("step");
    end = end != std::string::npos && end > 1 && words[end - 1] == ' ' ? end - 1 : end;
    size_t begin = end;
    while (begin != std::string::npos && begin > 0 && words[begin - 1] >= '0' && words[begin - 1] <= '9') {
        --begin;
    }
    const int steps = end == std::string::npos ? 0 : std::atoi(words.substr(begin, end - begin).c_str());
    return steps >= 1 && steps <= most_steps ? steps : 0;
}

const Distilled * find_kind(const std::string & words) {
    for (const Distilled & kind : KINDS) {
        if (words.find(kind.mark) != std::string::npos) {
            return &kind;
        }
    }
    return nullptr;
}

} // namespace

Defaults defaults_for(const std::string & path, const Defaults & usual) {
    const std::string words = words_of(path);
    if (const Distilled * kind = find_kind(words)) {
        Defaults out = kind->defaults;
        out.steps = steps_of(words) > 0 ? steps_of(words) : out.steps;
        out.clip_skip = usual.clip_skip;
        return out;
    }
    return usual;
}

std::optional<DistilledLora> settings_of_lora(const std::string & path, const Pipeline & model) {
    const std::string words = words_of(path);
    const int         stated = steps_of(words);
    const float       usual = model.defaults().cfg_scale;
    const bool        tells = stated > 0 || std::any_of(std::begin(MODELS), std::end(MODELS), [&](const char * model_name) {
        return words.find(model_name) != std::string::npos;
    });
    const bool        keeps_cfg = words.find(" cfg") != std::string::npos; // "Hyper-SDXL-8steps-CFG-lora"
    if (model.prediction() == Prediction::flow) {
        for (const DistilledFlow & kind : FLOWS) {
            if (tells && words.find(kind.mark) != std::string::npos) {
                const int steps = stated > 0 ? stated : kind.steps;
                return DistilledLora{steps, usual, kind.multiplier,
                                     text("%s, made for steps %d and multiplier %g", kind.name, steps, kind.multiplier)};
            }
        }
        return std::nullopt;
    }
    for (const Distilled & kind : KINDS) {
        if ((tells || !kind.is_a_word) && words.find(kind.mark) != std::string::npos) {
            const int   steps = stated > 0 ? stated : kind.defaults.steps;
            const float cfg_scale = keeps_cfg ? usual : kind.defaults.cfg_scale;
            return DistilledLora{steps, cfg_scale, 1,
                                 text("%s, made for steps %d, cfg_scale %g, sampler '%s' and scheduler '%s'", kind.name,
                                      steps, static_cast<double>(cfg_scale), kind.defaults.sampler, kind.defaults.scheduler)};
        }
    }
    return std::nullopt;
}

Defaults distilled_flow(const std::string & path, const Defaults & usual, int steps) {
    const std::string words = words_of(path);
    Defaults          out = usual;
    if (find_kind(words) || words.find(" hyper ") != std::string::npos) {
        out.steps = steps_of(words) > 0 ? steps_of(words) : std::min(steps, usual.steps);
        out.cfg_scale = 1;
    }
    return out;
}

bool is_kontext(const std::string & path) { return words_of(path).find("kontext") != std::string::npos; }

bool is_sdxl_turbo(const std::string & path) {
    std::string words = words_of(path);
    words.erase(std::remove(words.begin(), words.end(), ' '), words.end());
    return words.rfind("sdxlturbo", 0) == 0;
}

} // namespace sd
