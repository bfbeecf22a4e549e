// Whether this processor can run the ggml that is loaded.
#pragma once

namespace sd {

// ggml's CPU part is compiled for fixed instruction sets and never asks: where one is missing, the first such instruction
// ends the process. Throws a sentence instead, before any of its code runs.
void check_processor();

} // namespace sd
