#include "checkpoint/shape.h"

#include "core/words.h"

#include <algorithm>

namespace sd {

bool set_shape(StoredTensor & tensor, const std::vector<uint64_t> & lengths) {
    const DTypeInfo & type = *dtype_info(static_cast<int32_t>(tensor.type));
    const uint64_t    limit = static_cast<uint64_t>(INT64_MAX) / type.block_bytes;
    uint64_t          space = 1; // with 1 in place of 0, so that no partial product overflows either
    bool              empty = false;
    for (const uint64_t length : lengths) {
        empty = empty || length == 0;
        if (std::max<uint64_t>(length, 1) > limit / space) {
            return false;
        }
        space *= std::max<uint64_t>(length, 1);
    }
    if (type.block > 1 && (lengths.empty() || lengths[0] % static_cast<uint64_t>(type.block) != 0)) {
        return false;
    }
    tensor.dims = static_cast<int>(lengths.size());
    tensor.ne = {1, 1, 1, 1};
    for (size_t i = 0; i < lengths.size(); ++i) {
        tensor.ne[std::min<size_t>(i, 3)] *= static_cast<int64_t>(lengths[i]);
    }
    tensor.bytes =
        empty ? 0 : static_cast<size_t>(space / static_cast<uint64_t>(type.block)) * type.block_bytes;
    return true;
}

std::string shape_text(const std::vector<uint64_t> & lengths) {
    constexpr size_t SHOWN = 8;
    std::string      out = "[";
    for (size_t i = 0; i < lengths.size() && i < SHOWN; ++i) {
        out += (i ? ", " : "") + std::to_string(lengths[i]);
    }
    return out + (lengths.size() > SHOWN ? ", ...]" : "]");
}

} // namespace sd
