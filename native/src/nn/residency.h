// Which parts of a model are in memory: what each takes, and who leaves where there is not room for all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <set>
#include <string>
#include <vector>

namespace sd {

// All weights below one root, a network's: they come together, and leave together.
struct Component {
    std::string name;       // "text_encoders.t5xxl.transformer"
    size_t      copied = 0; // bytes that it takes of the device's memory
    size_t      mapped = 0; // bytes that are used where they lie in a mapped file, whose pages can be given back
    bool        here = false;
    uint64_t    used = 0; // the larger, the later

    size_t bytes() const { return copied + mapped; }
};

using ComponentSet = std::set<size_t>; // by index

// The only place that decides: who has to leave so that `bytes` more fit into `room`. The longest unused leaves first, those
// that stay never do, and nobody leaves where there is room.
std::vector<size_t> leaving(const std::vector<Component> & components, const ComponentSet & staying, size_t bytes,
                            size_t room);

} // namespace sd
