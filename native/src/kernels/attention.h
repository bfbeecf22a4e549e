// Attention that never holds the matrix of scores.
#pragma once

#include "kernels/operation.h"

namespace sd {

class Attention final : public Operation {
  public:
    // softmax(q k^T scale + mask) v, heads side by side: q [C, Tq, N], k and v [C, Tk, N], contiguous f32; `mask` is null, or
    // [Tk, Tq] for all heads, or [Tk, Tq, heads].
    Attention(const KernelSet & kernel_set, Pool & threads, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, int64_t heads,
              float scale, ggml_tensor * mask);

    ggml_tensor * append_to(ggml_context * ctx) override;
    void          run(ggml_tensor * out) override;
    std::string   describe() const override;
    std::unique_ptr<Operation> narrowed() const override;
    double        flops() const override;

  private:
    ggml_tensor *q_, *k_, *v_, *mask_;
    int64_t      heads_;
    float        scale_;
};

} // namespace sd
