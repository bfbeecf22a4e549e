// LoRAs written into weights: rebuilt from the base (restore), or added to what is resident (diff).
#pragma once

#include "lora/lora_formats.h"

#include <utility>
#include <vector>

namespace sd {

// The updates that act on one weight, with their multipliers, in canonical order.
struct WeightSum {
    const Weight * weight = nullptr;

    struct Term {
        const Update * update;
        double multiplier;
        double former = 0; // diff: what is in the weight already

        bool operator==(const Term & other) const {
            return update == other.update && multiplier == other.multiplier;
        }
    };
    std::vector<Term> terms;
};

struct MergeOptions {
    bool requantise = false; // a quantised weight that is touched: its own type again, rather than f16
};

class LoraMerge {
  public:
    LoraMerge(WeightStore & weights, const Device & device, const MergeOptions & options)
        : weights_(weights), device_(device), options_(options) {}

    // Each weight becomes base + Σ multiplier · delta in f32, rounded once; one without terms becomes the
    // base's own bytes again. The result depends on nothing but its arguments.
    void rebuild(const std::vector<WeightSum> & sums);

    // Adds Σ (multiplier − former) · delta to what is resident, rounded each time. All or nothing.
    void add(const std::vector<WeightSum> & sums);

    // The relative RMS of what is resident against what rebuild() would make of the same sums.
    double drift(const std::vector<WeightSum> & sums) const;

  private:
    struct Piece; // some rows of a weight
    std::vector<Piece> pieces(const std::vector<WeightSum> & sums) const;
    void check_range(const Piece & piece, const std::vector<float> & rows) const;
    void compute(const Piece & piece, bool onto_resident, std::vector<float> & rows) const;
    void prepare(const Weight & weight);

    WeightStore & weights_;
    const Device & device_;
    MergeOptions options_;
};

} // namespace sd
