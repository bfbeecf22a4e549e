// The roof that products are held against.
#pragma once

#include "kernels/pool.h"
#include "kernels/set.h"

namespace sd {

// Additions and multiplications a second that all threads together make in products whose rows, weights and sums lie in
// the second-level cache: the best of some twentieths of a second.
double peak_rate(const KernelSet & set, Pool & pool);

} // namespace sd
