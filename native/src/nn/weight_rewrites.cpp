// Weights that adapters change: a private tensor in the place of the file's mapping, written as floats and
// given back without a trace. The file, mapped or in RAM, is the base; nothing of it is ever written.
#include "core/error.h"
#include "core/half.h"
#include "nn/device.h"
#include "nn/weights.h"

#include <ggml-backend.h>
#include <ggml-cpp.h>
#include <ggml.h>

#include <algorithm>
#include <limits>
#include <mutex>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace sd {

struct WeightStore::Rewrites {
    struct Private {
        ggml_context_ptr ctx;
        ggml_backend_buffer_ptr buffer;
        ggml_tensor * tensor;
    };
    std::unordered_map<const Weight *, Private> privates;
    std::unordered_set<const Weight *> overwritten; // in a buffer of their component
    std::unordered_map<const Weight *, std::vector<uint8_t>> away; // the bytes of those whose component is away
    std::mutex device;                                             // one transfer at a time
};

namespace {

// Any type's elements as floats. Rows of a tensor that was quantised in another shape need not be whole blocks.
void to_floats(DType type, const uint8_t * bytes, int64_t first, int64_t n, float * to) {
    const DTypeInfo & info = *dtype_info(static_cast<int32_t>(type));
    if (first % info.block != 0 || n % info.block != 0) {
        const int64_t begin = first / info.block * info.block;
        std::vector<float> blocks(static_cast<size_t>((first + n - begin + info.block - 1) / info.block * info.block));
        to_floats(type, bytes, begin, static_cast<int64_t>(blocks.size()), blocks.data());
        std::copy_n(blocks.begin() + (first - begin), n, to);
        return;
    }
    bytes += static_cast<size_t>(first / info.block) * info.block_bytes;
    if (info.block > 1) {
        const auto to_float = ggml_get_type_traits(static_cast<ggml_type>(type))->to_float;
        if (!to_float) {
            fail(Status::unsupported,
                 "a weight of type %s cannot be turned into floats, so no LoRA can change it", info.name);
        }
        to_float(bytes, to, n);
    } else {
        to_f32(type, bytes, to, static_cast<size_t>(n));
    }
}

void scale_by(float scale, float * values, int64_t n) {
    if (scale != 1) {
        std::for_each(values, values + n, [scale](float & value) { value *= scale; });
    }
}

void from_floats(ggml_type type, const float * from, int64_t n, int64_t row, void * to) {
    if (ggml_is_quantized(type)) {
        ggml_quantize_chunk(type, from, to, 0, n / row, row, nullptr);
    } else {
        from_f32(static_cast<DType>(type), from, to, static_cast<size_t>(n));
    }
}

size_t bytes_of(ggml_type type, int64_t elements) {
    return static_cast<size_t>(elements / ggml_blck_size(type)) * ggml_type_size(type);
}

bool is_away(const Weight & weight) { return !weight.tensor->data; }

} // namespace

size_t WeightStore::Piece::bytes() const {
    const DTypeInfo & info = *dtype_info(static_cast<int32_t>(type));
    return static_cast<size_t>(elements / info.block) * info.block_bytes;
}

std::vector<WeightStore::Piece> WeightStore::pieces(const Weight & weight) const {
    std::vector<Piece> out;
    if (weight.pieces.empty()) {
        out.push_back({weight.stored->type, weight.stored->data(), count(weight.ne), weight.stored->scale});
    }
    const int64_t row = weight.ne[1] == 1 ? 1 : weight.ne[0];
    for (const StoredRows & piece : weight.pieces) {
        const Piece before{piece.tensor->type, piece.tensor->data(), piece.first * row, piece.tensor->scale};
        out.push_back({before.type, before.data + before.bytes(), piece.rows * row, before.scale});
    }
    return out;
}

void WeightStore::read_base(const Weight & weight, int64_t first, int64_t n, float * to) const {
    const std::vector<Piece> from = pieces(weight);
    if (weight.transposed) {
        std::vector<float> there(static_cast<size_t>(count(weight.ne)));
        to_floats(from[0].type, from[0].data, 0, count(weight.ne), there.data());
        for (int64_t i = first; i < first + n; ++i) {
            const int64_t row = i / weight.ne[0], column = i % weight.ne[0];
            *to++ = there[static_cast<size_t>(column * weight.ne[1] + row)] * from[0].scale;
        }
        return;
    }
    for (const Piece & piece : from) {
        if (first < piece.elements && n > 0) {
            const int64_t here = std::min(n, piece.elements - first);
            to_floats(piece.type, piece.data, first, here, to);
            scale_by(piece.scale, to, here);
            to += here;
            n -= here;
        }
        first = std::max<int64_t>(0, first - piece.elements);
    }
}

void WeightStore::read(const Weight & weight, int64_t first, int64_t n, float * to) const {
    const ggml_tensor & tensor = *weight.tensor;
    const auto type = static_cast<DType>(tensor.type);
    if (is_away(weight)) {
        if (rewrites_ && rewrites_->away.count(&weight) > 0) {
            to_floats(type, rewrites_->away.at(&weight).data(), first, n, to);
            return;
        }
        read_base(weight, first, n, to);
        if (tensor.type == GGML_TYPE_F16) { // the only type of fewer digits that weights are converted to
            std::vector<uint8_t> bytes(bytes_of(tensor.type, n));
            from_f32(type, to, bytes.data(), static_cast<size_t>(n));
            to_f32(type, bytes.data(), to, static_cast<size_t>(n));
        }
        return;
    }
    if (ggml_backend_buffer_is_host(tensor.buffer)) {
        to_floats(type, static_cast<const uint8_t *>(tensor.data), first, n, to);
        return;
    }
    std::vector<uint8_t> bytes(bytes_of(tensor.type, n));
    {
        static std::mutex unwritten; // before the first weight is made writable
        const std::lock_guard<std::mutex> lock(rewrites_ ? rewrites_->device : unwritten);
        ggml_backend_tensor_get(&tensor, bytes.data(), bytes_of(tensor.type, first), bytes.size());
    }
    to_floats(type, bytes.data(), 0, n, to);
}

int32_t WeightStore::writable_type(const Weight & weight, bool requantise) const {
    const ggml_type loaded = weight.loaded->type;
    const bool again = requantise && !ggml_quantize_requires_imatrix(loaded);
    return ggml_is_quantized(loaded) && !again ? GGML_TYPE_F16 : loaded;
}

float WeightStore::largest_value(const Weight & weight, bool requantise) const {
    const int32_t type = writable_type(weight, requantise);
    return type == GGML_TYPE_F32 || type == GGML_TYPE_BF16 ? std::numeric_limits<float>::max() : 65504.0f;
}

void WeightStore::round(const Weight & weight, bool requantise, std::vector<float> & rows) const {
    const auto type = static_cast<ggml_type>(writable_type(weight, requantise));
    const auto n = static_cast<int64_t>(rows.size());
    std::vector<uint8_t> bytes(bytes_of(type, n));
    from_floats(type, rows.data(), n, weight.ne[0], bytes.data());
    to_floats(static_cast<DType>(type), bytes.data(), 0, n, rows.data());
}

void WeightStore::make_writable(const Weight & weight, bool requantise) {
    make_private(weight, writable_type(weight, requantise));
}

// Of this type, and not the file's mapping.
void WeightStore::make_private(const Weight & weight, int32_t type) {
    if (!rewrites_) {
        rewrites_ = std::make_shared<Rewrites>();
    }
    const bool mapped = weight.tensor->data == weight.stored->data();
    if (weight.tensor->type == type && !mapped) {
        const bool own = rewrites_->privates.count(&weight) > 0;
        if (!own && rewrites_->overwritten.insert(&weight).second && is_away(weight)) {
            rewrites_->away[&weight] = loaded_bytes(weight);
        }
        return;
    }
    Rewrites::Private made{};
    made.ctx.reset(ggml_init({ggml_tensor_overhead(), nullptr, true}));
    made.tensor = made.ctx ? ggml_new_tensor_4d(made.ctx.get(), static_cast<ggml_type>(type), weight.ne[0],
                                                weight.ne[1], weight.ne[2], weight.ne[3])
                           : nullptr;
    if (!made.tensor) {
        fail(Status::out_of_memory, "memory for '%s' with its LoRAs could not be had", weight.name.c_str());
    }
    if (!is_away(weight)) {
        made.buffer.reset(ggml_backend_alloc_ctx_tensors(made.ctx.get(), device_->backends()[0]));
    }
    if (!made.buffer && !is_away(weight)) { // what is away is written in the host's memory
        send_away(weight.component);
    }
    if (made.buffer) {
        ggml_backend_buffer_set_usage(made.buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    } else if (is_away(weight)) {
        made.tensor->buffer = nowhere();
        rewrites_->away[&weight].resize(ggml_nbytes(made.tensor));
    } else {
        fail(Status::out_of_memory, "%zu MB for '%s' with its LoRAs could not be had on %s",
             ggml_nbytes(made.tensor) >> 20, weight.name.c_str(), device_->name().c_str());
    }
    components_[weight.component].copied += ggml_nbytes(made.tensor);
    const_cast<Weight &>(weight).tensor =
        made.tensor; // only this store hands out weights, and never as constants
    rewrites_->privates[&weight] = std::move(made);
    ++epoch_;
}

void WeightStore::write(const Weight & weight, int64_t first, int64_t n, const float * from) {
    ggml_tensor & tensor = *weight.tensor;
    const size_t at = bytes_of(tensor.type, first);
    const bool away = is_away(weight);
    if (away || ggml_backend_buffer_is_host(tensor.buffer)) {
        uint8_t * bytes =
            away ? rewrites_->away.at(&weight).data() : static_cast<uint8_t *>(tensor.data);
        from_floats(tensor.type, from, n, tensor.ne[0], bytes + at);
        return;
    }
    std::vector<uint8_t> bytes(bytes_of(tensor.type, n));
    from_floats(tensor.type, from, n, tensor.ne[0], bytes.data());
    const std::lock_guard<std::mutex> lock(rewrites_->device);
    ggml_backend_tensor_set(&tensor, bytes.data(), at, bytes.size());
}

void WeightStore::restore(const Weight & weight) {
    if (!rewrites_) {
        return;
    }
    rewrites_->away.erase(&weight);
    const auto own = rewrites_->privates.find(&weight);
    if (own != rewrites_->privates.end()) {
        components_[weight.component].copied -= ggml_nbytes(own->second.tensor);
        const_cast<Weight &>(weight).tensor = weight.loaded;
        rewrites_->privates.erase(own);
        ++epoch_;
    } else if (rewrites_->overwritten.erase(&weight) > 0 && !is_away(weight)) {
        convert(weight);
    }
}

// ---- of components that leave and come -----------------------------------------------------------------

std::vector<uint8_t> WeightStore::current_bytes(const Weight & weight) const {
    if (!is_away(weight)) {
        std::vector<uint8_t> bytes(ggml_nbytes(weight.tensor));
        ggml_backend_tensor_get(weight.tensor, bytes.data(), 0, bytes.size());
        return bytes;
    }
    const bool written = rewrites_ && rewrites_->away.count(&weight) > 0;
    return written ? rewrites_->away.at(&weight) : loaded_bytes(weight);
}

void WeightStore::keep_rewrites(size_t component) {
    if (!rewrites_) {
        return;
    }
    const auto keep = [&](const Weight & weight) {
        if (weight.component == component && !is_away(weight)) {
            rewrites_->away[&weight] = current_bytes(weight);
        }
    };
    for (const Weight * weight : rewrites_->overwritten) {
        keep(*weight);
    }
    for (const auto & [weight, own] : rewrites_->privates) {
        keep(*weight);
    }
    free_privates(component);
}

void WeightStore::free_privates(size_t component) {
    if (!rewrites_) {
        return;
    }
    for (auto & [weight, own] : rewrites_->privates) {
        if (weight->component == component && rewrites_->away.count(weight) > 0) {
            own.buffer.reset();
            own.tensor->data = nullptr;
            own.tensor->extra = nullptr;
            own.tensor->buffer = nowhere();
        }
    }
}

void WeightStore::return_rewrites(size_t component) {
    if (!rewrites_) {
        return;
    }
    std::vector<const Weight *> returned;
    for (const auto & [weight, bytes] : rewrites_->away) {
        if (weight->component != component) {
            continue;
        }
        const auto own = rewrites_->privates.find(weight);
        if (own != rewrites_->privates.end()) {
            own->second.tensor->buffer = nullptr;
            own->second.buffer.reset(
                ggml_backend_alloc_ctx_tensors(own->second.ctx.get(), device_->backends()[0]));
            if (!own->second.buffer) {
                fail(Status::out_of_memory, "%zu MB for '%s' with its LoRAs could not be had on %s",
                     bytes.size() >> 20, weight->name.c_str(), device_->name().c_str());
            }
            ggml_backend_buffer_set_usage(own->second.buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
        }
        ggml_backend_tensor_set(weight->tensor, bytes.data(), 0, bytes.size());
        returned.push_back(weight);
    }
    for (const Weight * weight : returned) { // only now: where it fails half way, all of them are away again
        rewrites_->away.erase(weight);
    }
}

} // namespace sd
