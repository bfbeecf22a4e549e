#include "core/env.h"

#include <cstdlib>

namespace sd {

static std::string text_of(const char * value) { return value ? value : ""; }

std::string env_kernels() { return text_of(std::getenv("SDCPP_KERNELS")); }
std::string env_precision() { return text_of(std::getenv("SDCPP_PRECISION")); }

} // namespace sd
