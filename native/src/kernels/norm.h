// Norms over groups of channels and over rows.
#pragma once

#include "kernels/operation.h"

namespace sd {

// Group norm of pictures [C, W, H, N], channels side by side, and an activation (Wu and He, 2018).
class GroupNormOperation final : public Operation {
  public:
    GroupNormOperation(const KernelSet & kernel_set, Pool & threads, ggml_tensor * x, ggml_tensor * weight, ggml_tensor * bias,
                       int groups, float eps, Activation activation);

    ggml_tensor * append_to(ggml_context * ctx) override;
    void          run(ggml_tensor * out) override;
    std::string   describe() const override;
    std::unique_ptr<Operation> narrowed() const override;

    // The same with another activation.
    std::unique_ptr<GroupNormOperation> with(Activation activation) const;
    Activation                          activation() const { return activation_; }

  private:
    struct Moments {
        float *means, *squares; // [C, parts, N]
    };
    Moments moments() const;
    void    factors(int64_t image, const Moments & moments);

    ggml_tensor *      x_, *weight_, *bias_; // the vectors [C], or [C, N]
    int                groups_;
    float              eps_;
    Activation         activation_;
    int64_t            channels_, pixels_, images_, parts_;
    std::vector<float> centres_, scales_; // [C, N]
};

// Layer norm of each row of [C, ...], or its root mean square alone (Zhang and Sennrich, 2019). Vectors may be null.
class RowNorm final : public Operation {
  public:
    RowNorm(const KernelSet & kernel_set, Pool & threads, ggml_tensor * x, ggml_tensor * weight, ggml_tensor * bias, float eps,
            bool rms)
        : Operation(kernel_set, threads), x_(x), weight_(weight), bias_(bias), eps_(eps), rms_(rms) {}

    ggml_tensor * append_to(ggml_context * ctx) override;
    void          run(ggml_tensor * out) override;
    std::string   describe() const override;
    std::unique_ptr<Operation> narrowed() const override;

  private:
    ggml_tensor *x_, *weight_, *bias_; // the vectors [C], or [C, N] for rows of N pictures
    float        eps_;
    bool         rms_;
};

} // namespace sd
