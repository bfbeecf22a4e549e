// Stored tensors of any type as floats on the host.
#pragma once

#include "checkpoint/checkpoint.h"

namespace sd {

// Writes as many floats as the tensor has elements. Throws Error(unsupported) where ggml has no way to read the
// type.
void dequantise(const StoredTensor & stored, float * to);

} // namespace sd
