// How much memory the machine can still give.
#pragma once

#include <cstddef>

namespace sd {

// Bytes that could be had without pushing other programs out; the largest size_t where the system does not tell.
size_t available_memory();

} // namespace sd
