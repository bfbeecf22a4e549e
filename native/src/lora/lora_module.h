// One update of one weight, as a LoRA file stores it: factors by role, on the host. lora_file makes these from
// keys; lora_formats turns them into what is added to a weight.
#pragma once

#include "nn/weights.h"

#include <map>
#include <optional>
#include <string>
#include <vector>

namespace sd {

// A factor in f32, in the file's (numpy's) order of dimensions: a Linear's down is (rank, in).
struct Factor {
    std::vector<int64_t> shape;
    std::vector<float>   data;
};

// Factors have these shapes, as read_lora leaves them; k is a convolution's kernel, kh and kw, and there is none
// where it is 1x1. `in` counts input channels; a bias or a norm is a vector (out).
enum class LoraKind {
    low_rank, // down (r, in, k), up (out, r), [mid (r, r, k): Tucker core, then down is (r, in)]
    loha,     // w1_a (out, r), w1_b (r, in·k), w2_a, w2_b, [t1, t2 (r, r, k), then a is (r, out) and b (r, in)]
    lokr,     // w1 (o1, i1) or w1_a, w1_b; w2 (o2, i2, k) or w2_a, w2_b (r, i2·k); [t2, then a is (r, o2)]
    dense,    // diff (out, in, k): weights, biases and norms alike
    replace,  // diff: the new value itself, not a difference
    ia3,      // weight (out), or (in) where `on_input`
    glora,    // a1 (in, r), a2 (r, in), b1 (out, r), b2 (r, in, k), [bm (r, r, k), then b2 is (r, in)]
    oft,      // blocks (n, b, b), [rescale (out)]: rotates output rows
    boft,     // blocks (stages, n, b, b), [rescale]
    oft_input // rotation (n, b(b-1)/2), the strict upper triangles: rotates the in·k input columns (PEFT's OFT)
};

const char * lora_kind_name(LoraKind kind);

// Which part of which weight a module changes. Fused weights hold several modules of other spellings.
struct LoraTarget {
    const Weight * weight = nullptr;
    int64_t        first_row = 0, rows = 0; // of the output dimension
    bool           swap_halves = false;     // the file has the two halves of the rows the other way round
};

struct LoraModule {
    std::string                   stem; // as the file spells it
    LoraTarget                    target;
    LoraKind                      kind;
    std::map<std::string, Factor> factors; // roles as listed at LoraKind
    double                        scale = 1; // alpha / rank by the rules of the format; multiplies the delta once
    bool                          on_input = false; // ia3

    // DoRA: the norms that the rows (or columns) of weight + delta are brought to.
    std::optional<Factor> magnitude; // flattened
    bool                  magnitude_of_columns = false;

    // low_rank: the columns of down where they are more than the weight's inputs, as control LoRAs' are; 0: as many.
    int64_t inputs = 0;

    std::optional<double> constraint; // oft, boft: the limit on the norm of all of its blocks together

    // oft_input: terms of the series that PEFT takes for the Cayley transform, (I + Q)(I - Q)^-1. 0: PEFT's other
    // way, (I - Q)(I + Q)^-1 without a series.
    int cayley_terms = 5;
};

} // namespace sd
