#include "nn/processor.h"

// With GGML_BACKEND_DL ggml holds builds for several processors, and takes one that runs.
#if defined(SDCPP_X86_KERNELS) && defined(SDCPP_ONE_GGML_CPU)

#include "core/error.h"
#include "kernels/sets.h"

#include <ggml-cpu.h>
#include <ggml.h>

#include <string>

namespace sd {
namespace {

struct Needed {
    const char * name;
    bool         by_ggml, here;
};

} // namespace

void check_processor() {
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512cd") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    const Needed all[] = {
        {"SSE3", ggml_cpu_has_sse3() != 0, __builtin_cpu_supports("sse3") != 0},
        {"SSSE3", ggml_cpu_has_ssse3() != 0, __builtin_cpu_supports("ssse3") != 0},
        {"AVX", ggml_cpu_has_avx() != 0, __builtin_cpu_supports("avx") != 0},
        {"F16C", ggml_cpu_has_f16c() != 0, has_f16c() && __builtin_cpu_supports("avx")},
        {"FMA", ggml_cpu_has_fma() != 0, __builtin_cpu_supports("fma") != 0},
        {"AVX2", ggml_cpu_has_avx2() != 0, __builtin_cpu_supports("avx2") != 0},
        {"BMI2", ggml_cpu_has_bmi2() != 0, __builtin_cpu_supports("bmi2") != 0},
        {"AVX512", ggml_cpu_has_avx512() != 0, avx512},
        {"AVX512-VBMI", ggml_cpu_has_avx512_vbmi() != 0, __builtin_cpu_supports("avx512vbmi") != 0},
        {"AVX512-VNNI", ggml_cpu_has_avx512_vnni() != 0, __builtin_cpu_supports("avx512vnni") != 0},
        {"AVX512-BF16", ggml_cpu_has_avx512_bf16() != 0, __builtin_cpu_supports("avx512bf16") != 0},
    };
    std::string missing;
    for (const Needed & set : all) {
        if (set.by_ggml && !set.here) {
            missing += (missing.empty() ? "" : ", ") + std::string(set.name);
        }
    }
    if (!missing.empty()) {
        fail(Status::unsupported,
             "the installed ggml was built for processors with %s, which this one lacks; build it here: "
             "CMAKE_ARGS=\"-DGGML_NATIVE=ON\" pip install --no-cache-dir --force-reinstall --no-deps "
             "--no-binary libggml-python 'libggml-python==%s.*'",
             missing.c_str(), ggml_version());
    }
}

} // namespace sd

#else

namespace sd {

void check_processor() {}

} // namespace sd

#endif
