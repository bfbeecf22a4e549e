// How much memory runs of networks will take, before any weight is read.
#pragma once

#include "nn/runner.h"
#include "nn/weights.h"

#include <cstddef>
#include <string>
#include <vector>

namespace sd {

struct MemoryEstimate {
    struct Network {
        std::string name;
        size_t      weights, activations; // bytes
    };
    std::vector<Network> networks; // in the order in which they run
    size_t               peak = 0; // bytes of weights and activations at a time, once some components have left where they must
};

// Of these runs one after another, beginning with nothing in memory. Of weights that are used where they lie in a file
// those count whose pages are looked at: all but tables of embeddings.
MemoryEstimate estimate(const WeightStore & weights, const std::vector<NetworkCost> & costs);

} // namespace sd
