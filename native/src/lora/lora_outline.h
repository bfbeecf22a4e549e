// A LoRA file read module by module, for tools that rewrite files: against an outline, which is the names and
// shapes of a model's weights, so that the model itself need not be at hand.
#pragma once

#include "lora/lora_file.h"
#include "lora/lora_formats.h"
#include "lora/lora_source.h"

#include <deque>
#include <optional>
#include <string>
#include <vector>

namespace sd {

class LoraOutline {
  public:
    // The weights of the outline have no tensors. Throws as read_lora does, but that nothing fits is no error.
    LoraOutline(const std::string & path, std::deque<Weight> weights);

    // The sizes that a group's own tensors state of their weight; 0 where they leave one open. Kernels that lie
    // unfolded in the columns are counted there, and kh is 0 then.
    struct Form {
        int64_t out = 0, columns = 0, kh = 0, kw = 0;
    };

    struct Entry {
        const LoraGroup *         group;
        std::string               format;
        std::optional<LoraTarget> weight, bias; // what the stem means in the outline
        bool                      absent;       // it belongs to a component that the outline lacks
        Form                      stated;
    };

    const std::vector<Entry> & entries() const { return entries_; }
    const LoraReport &         report() const { return report_; }
    const std::deque<Weight> & weights() const { return weights_; }

    // What the entry's tensors are. Throws Error(bad_file) where something of them cannot be used.
    std::vector<LoraModule> read(size_t entry) const;

    // The whole change of one of these modules, [rows, columns], in the weight's order of rows. `base` holds the
    // n_base numbers of the target's rows of the pristine weight and may be null; a kind that depends on them is an
    // Error(bad_argument) then.
    std::vector<float> delta(size_t entry, size_t module, const float * base, int64_t n_base, float multiplier) const;

  private:
    std::deque<Weight> weights_;
    LoraNames          names_;
    LoraReport         report_;
    LoraSource         source_;
    std::vector<Entry> entries_;
};

} // namespace sd
