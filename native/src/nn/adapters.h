// What a graph knows of adapters: per weight, tensors that take part in its product. It knows nothing of
// files, formats or names. Strengths are a graph input, a number per image and entry, so that changing one
// rebuilds nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

struct ggml_tensor;

namespace sd {

struct Weight;

// Updates of one weight W [in, out] (or [kw, kh, in, out]); s are strengths.
struct Adapter {
    // y += up (s . (down x)): every low-rank update of this weight, side by side.
    ggml_tensor * down = nullptr; // [in, R], or [kw, kh, in, R]; of a table of embeddings [R, width]
    ggml_tensor * up = nullptr;   // [R, out]
    int64_t strengths = 0;        // the first of its R entries

    // y += s * kron(a, b) x without forming the product.
    struct Kronecker {
        ggml_tensor * a; // [I1, O1]
        ggml_tensor * b; // [I2, O2]
        int64_t strength;
    };
    std::vector<Kronecker> kroneckers;

    // y += s * delta x.
    struct Dense {
        ggml_tensor * delta; // W's shape
        int64_t strength;
    };
    std::vector<Dense> dense;

    // Vectors side by side, and their sum weighted by strengths: sum [n, images].
    struct Vectors {
        ggml_tensor * values = nullptr; // [E, n]
        int64_t strengths = 0;          // the first of its E entries
    };
    Vectors rows;    // y = (1 + sum) . (W x)
    Vectors columns; // y = W ((1 + sum) . x)
    Vectors shift;   // of weights that are vectors (biases, norms): w + sum
};

class Adapters {
  public:
    const Adapter * find(const Weight * weight) const {
        const auto at = by_weight.find(weight);
        return at == by_weight.end() ? nullptr : &at->second;
    }

    // No graph has more nodes on behalf of these than this.
    size_t max_nodes() const {
        size_t nodes = 0;
        for (const auto & [weight, adapter] : by_weight) {
            nodes += 32 + 16 * (adapter.kroneckers.size() + adapter.dense.size());
        }
        return nodes;
    }

    std::unordered_map<const Weight *, Adapter> by_weight;
    int64_t entries = 0; // length of the vector of strengths
    uint64_t id = 0;     // another whenever graphs built with it are out of date
};

} // namespace sd
