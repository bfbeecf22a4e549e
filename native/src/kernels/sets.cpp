#include "kernels/sets.h"

#include "core/error.h"

#include <vector>

#if defined(SDCPP_X86_KERNELS)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace sd {

#ifdef SDCPP_X86_KERNELS
extern const KernelSet set_avx2, set_avx512, set_avx512_bf16, set_amx;
#endif
extern const KernelSet set_plain;

#ifdef SDCPP_X86_KERNELS
bool has_f16c() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & 1u << 29);
}
#endif

namespace {

struct Candidate {
    const KernelSet * set;
    bool              runs_here;
};

#ifdef SDCPP_X86_KERNELS
// Linux lends the tile registers to processes that ask: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
bool has_amx() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & 1u << 22) || !(d & 1u << 24)) { // amx-bf16, amx-tile
        return false;
    }
#if defined(__linux__)
    static const bool lent = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    return lent;
#else
    return false;
#endif
}
#endif

// The best first.
std::vector<Candidate> candidates() {
    std::vector<Candidate> out;
#ifdef SDCPP_X86_KERNELS
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    out.push_back({&set_amx, avx512_bf16 && has_amx()});
    out.push_back({&set_avx512_bf16, avx512_bf16});
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
    std::string known = "reference", last;
    bool        exists = false;
    for (const auto & [set, runs_here] : candidates()) {
        if (last != set->name) {
            known += std::string(", ") + set->name;
            last = set->name;
        }
        const bool is_meant = name.empty() ? runs_here : name == set->name;
        exists = exists || is_meant;
        if (!is_meant || set->bf16 != bf16) {
            continue;
        }
        if (!runs_here) {
            fail(Status::unsupported, "this processor cannot run the kernels '%s'", name.c_str());
        }
        return set;
    }
    if (!name.empty() && name != "reference" && !exists) {
        fail(Status::bad_argument, "kernels '%s' are not known; there are: %s", name.c_str(), known.c_str());
    }
    if (!bf16) {
        fail(Status::unsupported, "the kernels '%s' multiply bf16 alone; take precision 'bf16' with them", name.c_str());
    }
    fail(Status::unsupported, "precision 'bf16' needs a processor that multiplies bf16 natively; take 'auto' or 'f32'");
}

} // namespace sd
