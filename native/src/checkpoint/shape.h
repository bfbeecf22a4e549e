// Sizes from untrusted numbers.
#pragma once

#include "checkpoint/checkpoint.h"

namespace sd {

// Sets `dims`, `ne` and `bytes` of a tensor whose type is known from its lengths, the fastest first.
// False where its size does not fit in 63 bits or its rows are no whole blocks of a quantised type.
bool set_shape(StoredTensor & tensor, const std::vector<uint64_t> & lengths);

// "[77, 768]", for messages.
std::string shape_text(const std::vector<uint64_t> & lengths);

} // namespace sd
