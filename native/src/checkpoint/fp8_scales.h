// Weights in 8-bit floats with a scale, as files for ComfyUI have them: `X.weight` in f8 and one number
// `X.scale_weight` or `X.weight_scale`, by which it is multiplied. Beside them lie scales for activations
// (`X.scale_input`, `X.input_scale`), a mark (`scaled_fp8`) or the format's name (`X.comfy_quant`), which matter to
// products in 8 bits alone.
#pragma once

#include "checkpoint/checkpoint.h"

namespace sd {

// Gives weights their scale and drops what belongs to it. Throws Error(bad_file / unsupported) for scales of other
// forms.
void take_scales(std::vector<StoredTensor> & tensors);

} // namespace sd
