#include "families/family.h"

#include "core/error.h"

#include <algorithm>

namespace sd {

extern const Family sd1, sd2, sdxl, flux, sd3;

const std::vector<const Family *> & families() {
    static const std::vector<const Family *> table{&sd1, &sd2, &sdxl, &flux, &sd3};
    return table;
}

std::string Family::written() const {
    std::string out = name;
    std::transform(out.begin(), out.end(), out.begin(),
                   [](char c) { return static_cast<char>(c >= 'a' && c <= 'z' ? c - 'a' + 'A' : c); });
    return out;
}

void Pipeline::learn(const std::vector<LearnedText> & words) {
    if (!words.empty()) {
        fail(Status::unsupported, "embedding '%s': models of this family do not take embeddings here",
             words.front().name.c_str());
    }
}

const Family & recognise(const Checkpoint & checkpoint) {
    for (const Family * family : families()) {
        if (family->recognises(checkpoint)) {
            return *family;
        }
    }
    std::string known;
    for (const Family * family : families()) {
        known += (known.empty() ? "" : ", ") + std::string(family->name);
    }
    const std::string first = checkpoint.tensors().empty() ? "no tensors at all"
                                                           : "names such as " + checkpoint.tensors().front().name;
    fail(Status::unsupported, "%s: holds %s, which is no model of a family that we know (%s)",
         checkpoint.path().c_str(), first.c_str(), known.c_str());
}

} // namespace sd
