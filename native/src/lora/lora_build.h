// From the tensors of one stem to modules: which kinds of update they are, checked against their weights, with
// their scale.
#pragma once

#include "lora/lora_config.h"
#include "lora/lora_factors.h"
#include "lora/lora_file.h"
#include "lora/lora_keys.h"

#include <map>
#include <string>
#include <utility>
#include <vector>

namespace sd {

// All tensors of a stem.
struct LoraGroup {
    struct Member {
        LoraKey              key;
        const StoredTensor * tensor;
    };
    std::string         stem;
    std::vector<Member> members;

    // The tensor of that role, of that spelling where one is given; null where there is none.
    const StoredTensor * find(LoraRole role, const std::string & spelling = "") const;
    bool                 has_update() const; // more than a bare parameter
};

// What a file's modules had to say against their weights.
struct LoraFit {
    int                 by_shape = 0; // modules that did not fit
    const Weight *      weight = nullptr; // of the module that tells most: one that reads the text, else the first
    int64_t             inputs_there = 0;
    std::string         first;    // its sentence
    bool                other_text = false; // made for another width of text
};

class LoraBuilder {
  public:
    LoraBuilder(const LoraNames & names, const LoraConfig & config, bool flags_ia3, LoraReport & report)
        : names_(names), config_(config), flags_ia3_(flags_ia3), report_(report) {}

    // Adds what the group means to `modules`, and what can't be used to the report. False where its stem means
    // nothing in this model.
    bool add(const LoraGroup & group, std::vector<LoraModule> & modules);

    // A sentence about some modules goes into the report once, with their number.
    void finish();

    const LoraFit & fit() const { return fit_; }

  private:
    using Modules = std::vector<LoraModule>;

    template <typename Build> void attempt(const LoraGroup & group, const LoraTarget * target, Build build);

    void add_low_rank(const LoraGroup & group, const LoraTarget & target, const std::string & spelling,
                      Modules & out);
    void add_embedding(const LoraGroup & group, const LoraTarget & target, const std::string & spelling,
                       Modules & out);
    void add_up_bias(const LoraGroup & group, const LoraTarget & target, const std::string & spelling,
                     Modules & out);
    void add_loha(const LoraGroup & group, const LoraTarget & target, Modules & out);
    void add_lokr(const LoraGroup & group, const LoraTarget & target, Modules & out);
    void add_glora(const LoraGroup & group, const LoraTarget & target, Modules & out);
    void add_whole(const LoraGroup & group, const LoraTarget & target, LoraRole role, LoraKind kind,
                   Modules & out);
    void add_ia3(const LoraGroup & group, const LoraTarget & target, Modules & out);
    void add_oft(const LoraGroup & group, const LoraTarget & target, const LoraGroup::Member & blocks,
                 Modules & out);
    void add_oft_input(const LoraGroup & group, const LoraTarget & target, Modules & out);

    LoraModule begin(const LoraGroup & group, const LoraTarget & target, LoraKind kind) const;
    double     scale(const LoraGroup & group, int64_t rank);
    void       add_magnitude(const LoraGroup & group, const std::string & adapter, LoraModule & module,
                             int64_t padded);
    void       check_rank(const LoraGroup & group, int64_t rank, const WeightForm & form);
    void       warn(const std::string & sentence, const std::string & stem);
    void       note_padding(const LoraGroup & group, int64_t padded, const WeightForm & form);

    const LoraNames &  names_;
    const LoraConfig & config_;
    const bool         flags_ia3_; // the file says for IA3 which side it is on
    LoraReport &       report_;
    LoraFit            fit_;

    std::map<std::string, std::pair<int, std::string>> warnings_; // sentence -> modules, the first of them
};

} // namespace sd
