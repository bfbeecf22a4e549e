// Weights in the memory of a device: what form they have there, and how components come and leave.
#include "core/error.h"
#include "core/half.h"
#include "core/parallel.h"
#include "nn/device.h"
#include "nn/weights.h"

#include <ggml-backend.h>
#include <ggml-cpp.h>
#include <ggml.h>

#include <algorithm>
#include <limits>
#include <map>

namespace sd {
namespace {

constexpr size_t at_once = 32; // weights that are copied before the caller is asked whether to go on
constexpr size_t spare = size_t{512} << 20; // bytes that drivers and other programs take for themselves meanwhile

size_t less(size_t a, size_t b) { return a - std::min(a, b); }

// The type in which a weight is resident. ggml's operators want vectors (norms, biases) in f32, and its
// im2col knows convolution kernels in f16 and f32 only.
ggml_type resident_type(const Weight & weight) {
    const DType type = weight.stored->type;
    const bool  vector = weight.ne[1] * weight.ne[2] * weight.ne[3] == 1;
    const bool  kernel = weight.ne[2] * weight.ne[3] > 1;
    const bool  mixed = std::any_of(weight.pieces.begin(), weight.pieces.end(),
                                    [&](const StoredRows & piece) { return piece.tensor->type != type; });
    const bool  eighth = type == DType::f8_e4m3 || type == DType::f8_e5m2;
    const bool  half = type == DType::f16 || eighth; // every 8-bit float is exact in f16
    // Products with f16 round what they multiply to f16 first, which ends at 65504.
    const bool turned = weight.transposed && is_quantised(type); // blocks lie along the other dimension
    if (type == DType::f64 || vector || mixed || turned || (weight.wide && half) || (kernel && !half)) {
        return GGML_TYPE_F32;
    }
    const bool ragged = weight.ne[0] % dtype_info(static_cast<int32_t>(type))->block != 0; // rows are no whole blocks
    return half || ragged ? GGML_TYPE_F16 : static_cast<ggml_type>(type);
}

size_t megabytes(size_t bytes) { return bytes >> 20; }

} // namespace

struct WeightStore::Resident {
    ggml_context_ptr                                  tensors;
    ggml_backend_buffer_ptr                           nowhere;
    std::vector<ggml_backend_buffer_ptr>              files;
    std::vector<std::vector<Weight *>>                copied;  // by component
    std::vector<std::vector<ggml_backend_buffer_ptr>> buffers; // of those

    size_t padded(const Weight & weight) const {
        const ggml_backend_buffer_type_t type = ggml_backend_buffer_get_type(nowhere.get());
        const size_t alignment = ggml_backend_buft_get_alignment(type);
        return (ggml_backend_buft_get_alloc_size(type, weight.loaded) + alignment - 1) / alignment * alignment;
    }
};

WeightStore::WeightStore(Checkpoint checkpoint) : checkpoint_(std::move(checkpoint)) {}
WeightStore::~WeightStore() = default;

ggml_backend_buffer * WeightStore::nowhere() const { return resident_->nowhere.get(); }

void WeightStore::load(const Device & device, size_t limit, const Log & log) {
    const size_t meta = ggml_tensor_overhead() * (weights_.size() + 1);
    device_ = &device;
    limit_ = limit;
    log_ = log;
    resident_ = std::make_unique<Resident>();
    resident_->tensors.reset(ggml_init({meta, nullptr, true}));
    resident_->nowhere.reset(
        ggml_backend_buft_alloc_buffer(ggml_backend_get_default_buffer_type(device.backends()[0]), 0));
    if (!resident_->tensors || !resident_->nowhere) {
        fail(Status::out_of_memory, "%zu bytes for the table of weights could not be had", meta);
    }
    ggml_backend_buffer_set_usage(resident_->nowhere.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    resident_->copied.resize(components_.size());
    resident_->buffers.resize(components_.size());

    // Mapped files whose bytes can serve as they lie become ggml buffers of their own.
    std::map<const MappedFile *, ggml_backend_buffer_t> mapped;
    for (Weight & weight : weights_) {
        Component &     component = components_[weight.component];
        const ggml_type kind = resident_type(weight);
        weight.tensor = weight.loaded = ggml_new_tensor_4d(resident_->tensors.get(), kind, weight.ne[0], weight.ne[1],
                                                           weight.ne[2], weight.ne[3]);
        const bool whole = weight.pieces.empty() && !weight.transposed;
        const bool as_it_lies = whole && device.reads_host_memory() && kind == static_cast<ggml_type>(weight.stored->type) &&
                                weight.stored->offset % (kind == GGML_TYPE_F32 ? 4 : 2) == 0;
        if (!as_it_lies) {
            weight.copied = true;
            weight.tensor->buffer = resident_->nowhere.get();
            component.copied += resident_->padded(weight);
            resident_->copied[weight.component].push_back(&weight);
            continue;
        }
        const MappedFile * file = weight.stored->file;
        auto &             buffer = mapped[file];
        if (!buffer) {
            buffer = ggml_backend_cpu_buffer_from_ptr(const_cast<uint8_t *>(file->data()), file->size());
            ggml_backend_buffer_set_usage(buffer, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
            resident_->files.emplace_back(buffer);
        }
        ggml_backend_tensor_alloc(buffer, weight.tensor, const_cast<uint8_t *>(weight.stored->data()));
        component.mapped += file->in_ram() ? 0 : weight.stored->bytes;
    }
}

// ---- who is in memory ----------------------------------------------------------------------------------

// What the system calls free includes the pages of our own files, which are in use.
size_t WeightStore::room() const {
    size_t held = 0, mapped = 0;
    for (const Component & component : components_) {
        held += component.here ? component.bytes() : 0;
        mapped += component.here ? component.mapped : 0;
    }
    const size_t left = less(device_->memory_left(), mapped + spare);
    return limit_ == 0 ? left : std::min(left, less(limit_, held));
}

void WeightStore::make_room(const ComponentSet & staying, size_t bytes) {
    for (const size_t i : leaving(components_, staying, bytes, room())) {
        send_away(i);
    }
}

void WeightStore::need(const ComponentSet & wanted, size_t activations, const std::string & what) {
    size_t coming = 0, copied = 0, held = 0;
    ++runs_;
    for (const size_t i : wanted) {
        Component & component = components_[i];
        component.used = runs_;
        coming += component.here ? 0 : component.bytes();
        copied += component.here ? 0 : component.copied;
        held += component.here ? component.copied : 0;
    }
    make_room(wanted, coming + activations);
    // Pages of a file can be read again, but the rest must have room. Linux promises more of it than there is, and ends
    // the process that touches it.
    const size_t limited = limit_ == 0 ? std::numeric_limits<size_t>::max() : less(limit_, held);
    const size_t left = std::min(limited, device_->memory_left());
    if (copied + activations > left) {
        fail(Status::out_of_memory,
             "the activations of '%s' need %zu MB, beside %zu MB of weights, and %zu MB are free on %s; try a smaller picture "
             "or batch, vae_tile, or a quantised model",
             what.c_str(), megabytes(activations), megabytes(copied), megabytes(left), device_->name().c_str());
    }
    for (const size_t i : wanted) {
        bring(i, wanted);
    }
}

void WeightStore::bring(size_t i, const ComponentSet & staying) {
    Component & component = components_[i];
    if (component.here) {
        return;
    }
    ++epoch_;
    try {
        fill(i, staying);
        return_rewrites(i);
    } catch (...) {
        free_privates(i);
        clear(i);
        throw;
    }
    component.here = true;
    if (log_ && component.copied > 0) {
        log_(Level::debug, text("%s: %zu MB on %s", component.name.c_str(), megabytes(component.copied),
                                device_->name().c_str()));
    }
}

// Copies and converts what is used elsewhere than it lies, into buffers no larger than the device can give at once.
void WeightStore::fill(size_t i, const ComponentSet & staying) {
    const std::vector<Weight *> &    copied = resident_->copied[i];
    const ggml_backend_buffer_type_t type = ggml_backend_buffer_get_type(resident_->nowhere.get());
    const size_t                     largest = ggml_backend_buft_get_max_size(type);
    for (size_t first = 0; first < copied.size();) {
        size_t bytes = 0, next = first;
        do {
            bytes += resident_->padded(*copied[next++]);
        } while (next < copied.size() && bytes + resident_->padded(*copied[next]) <= largest);
        ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(type, bytes);
        while (!buffer) { // devices that do not tell what they have
            const std::vector<size_t> others = leaving(components_, staying, 1, 0);
            if (others.empty()) {
                fail(Status::out_of_memory, "%s: %zu MB for weights could not be had on %s; try a quantised model",
                     checkpoint_.path().c_str(), megabytes(bytes), device_->name().c_str());
            }
            send_away(others.front());
            buffer = ggml_backend_buft_alloc_buffer(type, bytes);
        }
        resident_->buffers[i].emplace_back(buffer);
        ggml_backend_buffer_set_usage(buffer, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
        auto * at = static_cast<uint8_t *>(ggml_backend_buffer_get_base(buffer));
        for (size_t k = first; k < next; ++k) {
            copied[k]->loaded->buffer = nullptr;
            ggml_backend_tensor_alloc(buffer, copied[k]->loaded, at);
            at += resident_->padded(*copied[k]);
        }
        while (first < next) {
            if (!device_->keep_going()) {
                fail(Status::cancelled, "stopped while '%s' was copied to %s", components_[i].name.c_str(),
                     device_->name().c_str());
            }
            const size_t n = std::min(at_once, next - first);
            parallel_for(device_->reads_host_memory() ? device_->threads() : 1, n,
                         [&](size_t k) { convert(*copied[first + k]); });
            first += n;
        }
    }
}

// Of what adapters have written a copy stays, in the host's memory where the device has its own.
void WeightStore::send_away(size_t i) {
    Component & component = components_[i];
    ++epoch_;
    keep_rewrites(i);
    clear(i);
    component.here = false;
    for (const Weight & weight : weights_) {
        if (weight.component == i) {
            forget_pages(weight);
        }
    }
    if (log_) {
        log_(Level::debug, text("%s: has left %s, %zu MB", component.name.c_str(), device_->name().c_str(),
                                megabytes(component.bytes())));
    }
}

void WeightStore::clear(size_t i) {
    for (Weight * weight : resident_->copied[i]) {
        weight->loaded->buffer = resident_->nowhere.get();
        weight->loaded->data = nullptr;
        weight->loaded->extra = nullptr;
    }
    resident_->buffers[i].clear();
}

void WeightStore::forget_pages(const Weight & weight) const {
    const auto forget = [](const StoredTensor & stored) { stored.file->forget(stored.offset, stored.bytes); };
    if (weight.pieces.empty()) {
        forget(*weight.stored);
    }
    for (const StoredRows & piece : weight.pieces) {
        forget(*piece.tensor);
    }
}

// ---- the bytes of a weight -----------------------------------------------------------------------------

size_t WeightStore::bytes(const Weight & weight) const { return ggml_nbytes(weight.loaded); }

std::vector<uint8_t> WeightStore::loaded_bytes(const Weight & weight) const {
    const ggml_tensor *      tensor = weight.loaded;
    std::vector<uint8_t>     bytes(ggml_nbytes(tensor));
    const std::vector<Piece> from = pieces(weight);
    const bool               as_stored = std::all_of(from.begin(), from.end(), [&](const Piece & piece) {
        return tensor->type == static_cast<ggml_type>(piece.type);
    });
    if (as_stored && !weight.transposed) {
        uint8_t * at = bytes.data();
        for (const Piece & piece : from) {
            at = std::copy_n(piece.data, piece.bytes(), at);
        }
        return bytes;
    }
    std::vector<float> floats(static_cast<size_t>(count(weight.ne)));
    read_base(weight, 0, count(weight.ne), floats.data());
    from_f32(static_cast<DType>(tensor->type), floats.data(), bytes.data(), floats.size());
    return bytes;
}

void WeightStore::convert(const Weight & weight) const {
    const bool as_it_lies = weight.pieces.empty() && !weight.transposed &&
                            weight.loaded->type == static_cast<ggml_type>(weight.stored->type);
    if (as_it_lies) {
        ggml_backend_tensor_set(weight.loaded, weight.stored->data(), 0, ggml_nbytes(weight.loaded));
    } else {
        const std::vector<uint8_t> bytes = loaded_bytes(weight);
        ggml_backend_tensor_set(weight.loaded, bytes.data(), 0, bytes.size());
    }
    forget_pages(weight);
}

} // namespace sd
