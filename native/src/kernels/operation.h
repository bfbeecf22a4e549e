// A node of a ggml graph that runs on a kernel set. ggml calls it in one thread; it spreads its work over the pool.
#pragma once

#include "kernels/pool.h"
#include "kernels/set.h"

#include <array>
#include <memory>
#include <string>
#include <vector>

struct ggml_context;
struct ggml_tensor;

namespace sd {

class Operation {
  public:
    Operation(const KernelSet & kernel_set, Pool & threads) : set(kernel_set), pool(threads) {}
    virtual ~Operation() = default;
    Operation(const Operation &) = delete;
    Operation & operator=(const Operation &) = delete;

    // Computes the node. All memory was made sure of when the node was made, and nothing throws.
    virtual void run(ggml_tensor * out) = 0;

    // The same with a result of bf16, for products that would round it; null where it cannot be.
    virtual std::unique_ptr<Operation> narrowed() const { return nullptr; }
    bool                               narrow() const { return narrow_; }

    virtual ggml_tensor * append_to(ggml_context * ctx) = 0;

    // For profiles: what it is, and how many additions and multiplications it makes, where these count.
    virtual std::string describe() const = 0;
    virtual double      flops() const { return 0; }

  protected:
    // Appends the node, of f32 or, where narrow, of bf16; the operation must live as long as the graph. `sources` are what it reads of the graph.
    ggml_tensor * append(ggml_context * ctx, const std::array<int64_t, 4> & ne, std::vector<ggml_tensor *> sources);

    Activations activations(ggml_tensor * out) const;

    const KernelSet & set;
    Pool &            pool;
    bool              narrow_ = false;
};

} // namespace sd
