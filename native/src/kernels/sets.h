// Which kernel set runs here.
#pragma once

#include "kernels/set.h"

#include <string>

namespace sd {

// The best of this processor, or the one of that name ("amx", "avx512", "avx2", "plain"). Null for "reference", which stands for
// ggml's own operations. Throws where the processor lacks what was asked for.
const KernelSet * kernel_set(const std::string & name, bool bf16);

// Whether the processor multiplies bf16 natively.
bool has_native_bf16();

// Of x86 alone: what Clang's __builtin_cpu_supports() does not know.
bool has_f16c();

} // namespace sd
