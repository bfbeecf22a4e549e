#include "core/env.h"

#include <cstdlib>

namespace sd {

static std::string value_of(const char * name) {
    const char * value = std::getenv(name);
    return value ? value : "";
}

std::string env_kernels() { return value_of("SDCPP_KERNELS"); }
std::string env_precision() { return value_of("SDCPP_PRECISION"); }

} // namespace sd
