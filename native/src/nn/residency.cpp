#include "nn/residency.h"

#include <algorithm>

namespace sd {

std::vector<size_t> leaving(const std::vector<Component> & components, const ComponentSet & staying, size_t bytes,
                            size_t room) {
    std::vector<size_t> could, out;
    for (size_t i = 0; i < components.size(); ++i) {
        if (components[i].here && components[i].bytes() > 0 && staying.count(i) == 0) {
            could.push_back(i);
        }
    }
    std::sort(could.begin(), could.end(),
              [&](size_t a, size_t b) { return components[a].used < components[b].used; });
    for (const size_t i : could) {
        if (bytes <= room) {
            break;
        }
        room += components[i].bytes();
        out.push_back(i);
    }
    return out;
}

} // namespace sd
