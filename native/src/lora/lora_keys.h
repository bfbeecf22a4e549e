// How LoRA files spell their keys: a stem, which names a module of the model, and a suffix, which names a role.
#pragma once

#include <optional>
#include <string>

namespace sd {

enum class LoraRole {
    down, up, mid, up_bias, embedding_down, embedding_up,
    hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b, hada_t1, hada_t2,
    lokr_w1, lokr_w1_a, lokr_w1_b, lokr_w2, lokr_w2_a, lokr_w2_b, lokr_t2,
    diff, diff_bias, set_weight,
    weight, bias,        // a parameter itself, or a part of IA3
    on_input, ia3_factor, // PEFT's IA3 multiplies by its factor, LyCORIS' by 1 + weight
    a1, a2, b1, b2, bm,
    oft_blocks, oft_rotation, rescale,
    magnitude,           // (out, 1) or (1, in)
    magnitude_of_rows,   // always of rows, whatever its shape
    alpha, scale, scalar,
    known,               // means something to trainers, nothing to the model
    bundled,             // an embedding that travels with the LoRA
    unreadable           // an update of a kind that is not known here
};

struct LoraKey {
    std::string  stem;
    LoraRole     role;
    std::string  spelling;      // of the pair of factors: both halves share it
    const char * format = "";   // the convention, where the suffix tells
    int          part = -1;     // of a fused weight, where the suffix counts them
};

// Nothing where no suffix is known.
std::optional<LoraKey> parse_lora_key(const std::string & key);

} // namespace sd
