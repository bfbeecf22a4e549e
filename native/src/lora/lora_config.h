// What PEFT and diffusers write beside a LoRA: alpha and rank, with patterns for modules that differ. From the
// metadata "lora_adapter_metadata", or an adapter_config.json.
#pragma once

#include "core/json.h"

#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace sd {

class LoraConfig {
  public:
    // `adapter_config` is the text of that file, or "". Throws Error(bad_file) where a text is no JSON.
    LoraConfig(const std::map<std::string, std::string> & metadata, const std::string & adapter_config,
               const std::string & path);

    // The scale of a module of this rank (0: of none of its own, then the config's); nothing where no config
    // speaks of it. Sets `other_rank` where the config states another one.
    std::optional<double> scale(const std::string & stem, int64_t rank, bool & other_rank) const;

    // See LoraModule.
    int cayley_terms() const { return uses_series_ ? cayley_terms_ : 0; }

    // Of IA3: whether a module is among the feed-forward ones, whose inputs are scaled; nothing where none are named.
    std::optional<bool> is_feedforward(const std::string & stem) const;

    const std::vector<std::string> & warnings() const { return warnings_; }

  private:
    using Patterns = std::vector<std::pair<std::string, double>>;

    // What is said of one component; "" is all of them.
    struct Component {
        std::optional<double> rank, alpha;
        Patterns              ranks, alphas;
        bool                  root_of_rank = false; // rsLoRA: alpha / sqrt(rank)
    };

    void                         read(const Json & config);
    void                         read_member(Component & component, const std::string & name, const Json & value);
    Patterns                     read_patterns(const Json & value);
    static std::optional<double> first_match(const Patterns & patterns, const std::string & module);

    std::map<std::string, Component> components_;
    bool                             uses_series_ = true;
    int                              cayley_terms_ = 5;
    std::optional<std::vector<std::string>> feedforward_;
    std::vector<std::string>         warnings_;
};

// Whether a key of rank_pattern or alpha_pattern means this module: as a regular expression it matches the path's
// end from its begin or behind a dot. Of expressions there are letters, ".", "\", "*", "+", "?", "^" and "$".
bool pattern_matches(const std::string & pattern, const std::string & module);

} // namespace sd
