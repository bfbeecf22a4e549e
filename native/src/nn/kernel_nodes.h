// Nodes of a graph that run on the CPU's kernels. What can be part of an earlier node becomes part of it: an activation
// of its product or norm, a sum of the product that made one of its addends, an enlarged picture of the convolution
// that reads it. The node that it replaces is never computed, for nothing refers to it.
#pragma once

#include "kernels/elementwise.h"
#include "kernels/norm.h"
#include "kernels/product.h"

#include <memory>
#include <unordered_map>
#include <vector>

namespace sd {

class KernelNodes {
  public:
    KernelNodes(ggml_context * ctx, const KernelSet & kernel_set, Pool & threads)
        : ctx_(ctx), set_(kernel_set), pool_(threads) {}

    // Pictures are [C, W, H, N] here, tokens [C, T, N].
    ggml_tensor * product(ProductParts parts);
    ggml_tensor * attention(ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, int64_t heads, float scale, ggml_tensor * mask);
    ggml_tensor * group_norm(ggml_tensor * x, ggml_tensor * weight, ggml_tensor * bias, int groups, float eps);
    ggml_tensor * row_norm(ggml_tensor * x, ggml_tensor * weight, ggml_tensor * bias, float eps, bool rms);
    ggml_tensor * activate(ggml_tensor * x, Activation activation);
    ggml_tensor * add(ggml_tensor * x, ggml_tensor * y);              // y may be broadcast
    ggml_tensor * add_per_image(ggml_tensor * x, ggml_tensor * y);    // [C, W, H, N] + [C, N]
    ggml_tensor * concat_channels(ggml_tensor * x, ggml_tensor * y);
    ggml_tensor * resize(ggml_tensor * x, int64_t width, int64_t height);

    // The first half of x times the gelu of the second; null where no product made x, or none that can be gated.
    ggml_tensor * geglu(ggml_tensor * x);

    ggml_tensor * contiguous(ggml_tensor * x);

    // Null where the node is one of ggml's own.
    const Operation * operation(const ggml_tensor * node) const {
        const auto at = operations_.find(node);
        return at == operations_.end() ? nullptr : at->second.get();
    }

  private:
    // x in bf16 where products round it to that and what made it can.
    ggml_tensor * narrow(ggml_tensor * x);

    template <typename Made> Made * made_by(ggml_tensor * x) const {
        const auto at = operations_.find(x);
        return at == operations_.end() ? nullptr : dynamic_cast<Made *>(at->second.get());
    }
    template <typename Made> ggml_tensor * keep(std::unique_ptr<Made> operation) {
        ggml_tensor * node = operation->append_to(ctx_);
        numbers_[node] = numbers_.size() + 1;
        operations_.emplace(node, std::move(operation));
        return node;
    }

    ggml_context *    ctx_;
    const KernelSet & set_;
    Pool &            pool_;
    std::unordered_map<const ggml_tensor *, std::unique_ptr<Operation>> operations_;
    std::unordered_map<const ggml_tensor *, ggml_tensor *>              narrow_; // in place of what
    std::unordered_map<const ggml_tensor *, size_t>                     numbers_; // in the order of making, from 1
};

} // namespace sd
