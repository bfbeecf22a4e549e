#include "kernels/sets.h"

#include "core/error.h"

#include <vector>

namespace sd {

#ifdef SDCPP_X86_KERNELS
extern const KernelSet set_avx2, set_avx512, set_avx512_bf16;
#endif
extern const KernelSet set_plain;

namespace {

struct Candidate {
    const KernelSet * set;
    bool              runs_here;
};

// The best first.
std::vector<Candidate> candidates() {
    std::vector<Candidate> out;
#ifdef SDCPP_X86_KERNELS
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    out.push_back({&set_avx512_bf16, avx512 && __builtin_cpu_supports("avx512bf16")});
    out.push_back({&set_avx512, avx512});
    out.push_back({&set_avx2, avx2});
#endif
    out.push_back({&set_plain, true});
    return out;
}

} // namespace

bool has_native_bf16() {
    for (const Candidate & candidate : candidates()) {
        if (candidate.runs_here && candidate.set->bf16) {
            return true;
        }
    }
    return false;
}

const KernelSet * kernel_set(const std::string & name, bool bf16) {
    if (name == "reference" && !bf16) {
        return nullptr;
    }
    std::string known = "reference";
    bool        exists = name == "reference";
    for (const Candidate & candidate : candidates()) {
        known += candidate.set->bf16 ? "" : std::string(", ") + candidate.set->name;
        if (name.empty() ? !candidate.runs_here : name != candidate.set->name) {
            continue;
        }
        exists = true;
        if (candidate.set->bf16 != bf16) {
            continue;
        }
        if (!candidate.runs_here) {
            fail(Status::unsupported, "this processor cannot run the kernels '%s'", name.c_str());
        }
        return candidate.set;
    }
    if (!exists) {
        fail(Status::bad_argument, "kernels '%s' are not known; there are: %s", name.c_str(), known.c_str());
    }
    fail(Status::unsupported, "precision 'bf16' needs a processor that multiplies bf16 natively; take 'auto' or 'f32'");
}

} // namespace sd
