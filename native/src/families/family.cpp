#include "families/family.h"

#include "core/error.h"

namespace sd {

extern const Family sd1, sd2, sdxl;

const std::vector<const Family *> & families() {
    static const std::vector<const Family *> table{&sd1, &sd2, &sdxl};
    return table;
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
