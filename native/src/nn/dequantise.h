// Stored tensors of any type as floats on the host.
#pragma once

#include "checkpoint/checkpoint.h"

namespace sd {

// `n` elements, of a quantised type whole blocks; `from` may be unaligned. The type is one that can be read.
void dequantise(DType type, const void * from, float * to, int64_t n);

// Writes as many floats as the tensor has elements. Throws Error(unsupported) where ggml has no way to read the
// type.
void dequantise(const StoredTensor & stored, float * to);

} // namespace sd
