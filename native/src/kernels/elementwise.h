// What works element by element or moves rows, spread over the threads.
#pragma once

#include "kernels/operation.h"

namespace sd {

class Activate final : public Operation {
  public:
    Activate(const KernelSet & kernel_set, Pool & threads, ggml_tensor * x, Activation activation)
        : Operation(kernel_set, threads), x_(x), activation_(activation) {}

    ggml_tensor * append_to(ggml_context * ctx) override;
    void          run(ggml_tensor * out) override;
    std::string   describe() const override;

  private:
    ggml_tensor * x_;
    Activation    activation_;
};

// The sum of two tensors of one shape.
class Add final : public Operation {
  public:
    Add(const KernelSet & kernel_set, Pool & threads, ggml_tensor * x, ggml_tensor * y)
        : Operation(kernel_set, threads), x_(x), y_(y) {}

    ggml_tensor * append_to(ggml_context * ctx) override;
    void          run(ggml_tensor * out) override;
    std::string   describe() const override;

  private:
    ggml_tensor *x_, *y_;
};

// Channels of x, then those of y: [A, W, H, N], [B, W, H, N] -> [A + B, W, H, N].
class ConcatChannels final : public Operation {
  public:
    ConcatChannels(const KernelSet & kernel_set, Pool & threads, ggml_tensor * x, ggml_tensor * y)
        : Operation(kernel_set, threads), x_(x), y_(y) {}

    ggml_tensor * append_to(ggml_context * ctx) override;
    void          run(ggml_tensor * out) override;
    std::string   describe() const override;

  private:
    ggml_tensor *x_, *y_;
};

// A picture [C, W, H, N] at another size, nearest.
class Resize final : public Operation {
  public:
    Resize(const KernelSet & kernel_set, Pool & threads, ggml_tensor * x, int64_t width, int64_t height)
        : Operation(kernel_set, threads), x_(x), width_(width), height_(height) {}

    ggml_tensor * append_to(ggml_context * ctx) override;
    void          run(ggml_tensor * out) override;
    std::string   describe() const override;

    ggml_tensor * x() const { return x_; }
    int64_t       width() const { return width_; }
    int64_t       height() const { return height_; }

  private:
    ggml_tensor * x_;
    int64_t       width_, height_;
};

} // namespace sd
