#include "kernels/operation.h"

#include <ggml.h>

namespace sd {

ggml_tensor * Operation::append(ggml_context * ctx, const std::array<int64_t, 4> & ne, std::vector<ggml_tensor *> sources) {
    const auto call = [](ggml_tensor * out, int, int, void * self) { static_cast<Operation *>(self)->run(out); };
    return ggml_custom_4d(ctx, narrow_ ? GGML_TYPE_BF16 : GGML_TYPE_F32, ne[0], ne[1], ne[2], ne[3], sources.data(), static_cast<int>(sources.size()),
                          call, 1, this);
}

Activations Operation::activations(ggml_tensor * out) const { return {out->data, out->type == GGML_TYPE_BF16}; }

} // namespace sd
