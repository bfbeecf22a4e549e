// Tensors of floats on a device, declared one by one, allocated together and filled from the host.
#pragma once

#include "core/tensor.h"

#include <functional>
#include <memory>

struct ggml_tensor;

namespace sd {

class Device;

class DeviceTensors {
  public:
    explicit DeviceTensors(size_t at_most); // tensors
    ~DeviceTensors();

    ggml_tensor * add(const Shape & ne);

    size_t bytes() const; // of all tensors
    bool is_allocated() const;
    // Throws std::bad_alloc: what to do about it, only those know whose tensors they are.
    void allocate(const Device & device);

    // `write` is given room for all of the tensor's elements; on devices whose memory the host cannot touch
    // they are sent from there. For several threads at once, on tensors of their own.
    static void fill(ggml_tensor * tensor, const std::function<void(float *)> & write);

  private:
    struct State;
    std::unique_ptr<State> state_;
};

} // namespace sd
