#include "nn/device_tensors.h"

#include "core/error.h"
#include "nn/device.h"

#include <ggml-backend.h>
#include <ggml-cpp.h>
#include <ggml.h>

#include <mutex>
#include <new>

namespace sd {

struct DeviceTensors::State {
    ggml_context_ptr ctx;
    ggml_backend_buffer_ptr buffer;
    size_t bytes = 0;
};

DeviceTensors::DeviceTensors(size_t at_most) : state_(std::make_unique<State>()) {
    state_->ctx.reset(ggml_init({ggml_tensor_overhead() * at_most, nullptr, true}));
    if (!state_->ctx) {
        fail(Status::out_of_memory, "memory for a table of %zu tensors could not be had", at_most);
    }
}

DeviceTensors::~DeviceTensors() = default;

ggml_tensor * DeviceTensors::add(const Shape & ne) {
    ggml_tensor * tensor = ggml_new_tensor_4d(state_->ctx.get(), GGML_TYPE_F32, ne[0], ne[1], ne[2], ne[3]);
    state_->bytes += ggml_nbytes(tensor);
    return tensor;
}

size_t DeviceTensors::bytes() const { return state_->bytes; }

bool DeviceTensors::is_allocated() const { return state_->bytes == 0 || state_->buffer; }

void DeviceTensors::allocate(const Device & device) {
    if (is_allocated()) {
        return;
    }
    state_->buffer.reset(ggml_backend_alloc_ctx_tensors(state_->ctx.get(), device.backends()[0]));
    if (!state_->buffer) {
        throw std::bad_alloc();
    }
    ggml_backend_buffer_set_usage(state_->buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
}

void DeviceTensors::fill(ggml_tensor * tensor, const std::function<void(float *)> & write) {
    if (ggml_backend_buffer_is_host(tensor->buffer)) {
        write(static_cast<float *>(tensor->data));
        return;
    }
    std::vector<float> staging(static_cast<size_t>(ggml_nelements(tensor)));
    write(staging.data());
    static std::mutex one_transfer_at_a_time;
    const std::lock_guard<std::mutex> lock(one_transfer_at_a_time);
    ggml_backend_tensor_set(tensor, staging.data(), 0, ggml_nbytes(tensor));
}

} // namespace sd
