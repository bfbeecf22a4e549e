// Every environment variable that the engine reads; all are for tests and measurements.
#pragma once

#include <string>

namespace sd {

// SDCPP_KERNELS: the CPU's kernel set, "reference" for ggml's own operations; "": the best.
std::string env_kernels();

// SDCPP_PRECISION: what precision "auto" stands for; "": the processor decides.
std::string env_precision();

} // namespace sd
