#include "nn/dequantise.h"

#include "core/error.h"
#include "core/half.h"

#include <ggml.h>

namespace sd {

void dequantise(DType type, const void * from, float * to, int64_t n) {
    if (is_quantised(type)) {
        ggml_get_type_traits(static_cast<ggml_type>(type))->to_float(from, to, n);
    } else {
        to_f32(type, from, to, static_cast<size_t>(n));
    }
}

void dequantise(const StoredTensor & stored, float * to) {
    if (is_quantised(stored.type) && !ggml_get_type_traits(static_cast<ggml_type>(stored.type))->to_float) {
        fail(Status::unsupported, "%s: tensor '%s' is of type %s, which cannot be turned into floats",
             stored.file->path().c_str(), stored.name.c_str(), dtype_name(stored.type));
    }
    dequantise(stored.type, stored.data(), to, count(stored.ne));
}

} // namespace sd
