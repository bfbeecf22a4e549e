#include "nn/estimate.h"

#include <algorithm>
#include <set>

namespace sd {

MemoryEstimate estimate(const WeightStore & store, const std::vector<NetworkCost> & costs) {
    std::vector<Component>   components = store.components();
    size_t                   room = store.room();
    uint64_t                 runs = 0;
    std::set<const Weight *> touched;
    MemoryEstimate           out;
    for (Component & component : components) {
        room += component.here ? component.bytes() : 0;
        component.here = false;
    }
    const auto held = [&](const std::set<const Weight *> & weights) {
        size_t bytes = 0;
        for (const Weight * weight : weights) {
            const bool looked_up = weight->table && store.lies_in_file(*weight);
            bytes += components[weight->component].here && !looked_up ? store.bytes(*weight) : 0;
        }
        return bytes;
    };
    for (const NetworkCost & cost : costs) {
        ComponentSet wanted;
        size_t       coming = cost.activations;
        ++runs;
        for (const Weight * weight : cost.weights) {
            if (wanted.insert(weight->component).second) {
                Component & component = components[weight->component];
                component.used = runs;
                coming += component.here ? 0 : component.bytes();
            }
        }
        for (const size_t i : leaving(components, wanted, coming, room)) {
            components[i].here = false;
            room += components[i].bytes();
        }
        for (const size_t i : wanted) {
            room -= components[i].here ? 0 : std::min(room, components[i].bytes());
            components[i].here = true;
        }
        for (const Weight & weight : store.weights()) { // what is copied comes with its component
            if (wanted.count(weight.component) > 0 && (!store.lies_in_file(weight) || cost.weights.count(&weight) > 0)) {
                touched.insert(&weight);
            }
        }
        const MemoryEstimate::Network network{cost.network, held(cost.weights), cost.activations};
        const bool known = std::any_of(out.networks.begin(), out.networks.end(), [&](const auto & other) {
            return other.name == network.name && other.activations == network.activations;
        });
        if (!known) {
            out.networks.push_back(network);
        }
        out.peak = std::max(out.peak, held(touched) + cost.activations);
    }
    return out;
}

} // namespace sd
