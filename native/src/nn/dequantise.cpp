#include "nn/dequantise.h"

#include "core/error.h"
#include "core/half.h"

#include <ggml.h>

namespace sd {

void dequantise(const StoredTensor & stored, float * to) {
    const int64_t n = count(stored.ne);
    if (!is_quantised(stored.type)) {
        to_f32(stored.type, stored.data(), to, static_cast<size_t>(n));
        for (int64_t i = 0; stored.scale != 1 && i < n; ++i) {
            to[i] *= stored.scale;
        }
        return;
    }
    const auto to_float = ggml_get_type_traits(static_cast<ggml_type>(stored.type))->to_float;
    if (!to_float) {
        fail(Status::unsupported, "%s: tensor '%s' is of type %s, which cannot be turned into floats",
             stored.file->path().c_str(), stored.name.c_str(), dtype_name(stored.type));
    }
    to_float(stored.data(), to, n);
}

} // namespace sd
