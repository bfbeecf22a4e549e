// Runtime adapters: the updates of all active LoRAs as tensors on the device, packed side by side per weight.
// The base is never written; how strongly each acts is a number that a graph reads.
#pragma once

#include "lora/lora_formats.h"
#include "nn/adapters.h"
#include "nn/device_tensors.h"

#include <functional>
#include <map>
#include <memory>
#include <utility>
#include <vector>

namespace sd {

struct LoadedLora;

// One update that takes part. Where it does not grow with its multiplier, the multiplier is fixed here, and
// it takes part once for each that some image asks for.
struct ActiveUpdate {
    const Update * update = nullptr;
    const LoadedLora * lora = nullptr; // whose
    float fixed = 0;

    bool operator==(const ActiveUpdate & other) const {
        return update == other.update && fixed == other.fixed;
    }
};

class LoraPack {
  public:
    // `former` lends the dense tensors that both have. Throws Error(out_of_memory).
    LoraPack(std::vector<ActiveUpdate> active, const WeightStore & weights, const Device & device,
             const LoraPack * former);
    ~LoraPack();
    LoraPack(const LoraPack &) = delete;
    LoraPack & operator=(const LoraPack &) = delete;

    const Adapters & adapters() const { return adapters_; }
    const std::vector<ActiveUpdate> & active() const { return active_; }

    // Writes the strength of each entry: what `of` says for its update.
    void strengths(const std::function<float(const ActiveUpdate &)> & of, float * to) const;

    size_t bytes() const; // on the device

  private:
    struct Fill; // a tensor, and what writes its values
    struct Dense {
        std::shared_ptr<DeviceTensors> memory; // its own, so that it may go from pack to pack
        ggml_tensor * delta;
    };
    using Members = std::vector<size_t>; // of active_

    // Declare the tensors of one weight's adapter.
    Adapter declare(const Weight & weight, const Members & members, std::vector<Fill> & fills,
                    const LoraPack * former);
    void declare_pair(const Weight & weight, const Members & members, Adapter & adapter,
                      std::vector<Fill> & fills);
    Adapter::Vectors declare_vectors(const Members & members, int64_t n, std::vector<Fill> & fills,
                                     const std::function<std::vector<float>(const Update &, float)> & values);
    void declare_dense(const Weight & weight, size_t member, Adapter & adapter, std::vector<Fill> & fills,
                       const LoraPack * former);
    void allocate(const std::vector<Fill> & fills);
    int64_t add_entries(size_t member, int64_t n); // the first of them
    std::vector<float> base_rows(const Update & update) const;
    std::vector<float> delta(const Update & update, float fixed) const;

    const WeightStore & weights_;
    const Device & device_;
    std::vector<ActiveUpdate> active_;
    Adapters adapters_;
    std::vector<std::pair<size_t, int64_t>> runs_; // entries in their order: whose, and how many
    DeviceTensors tensors_;
    std::map<std::pair<const Update *, float>, Dense> dense_;
};

} // namespace sd
