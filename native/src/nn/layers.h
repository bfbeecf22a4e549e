// Layers: a struct whose fields are its weights; constructing it declares them.
#pragma once

#include "nn/graph.h"
#include "nn/weights.h"

#include <optional>
#include <string>
#include <vector>

namespace sd {

struct Linear {
    Scope   here;
    int64_t in, out;
    bool    with_bias = true;

    const Weight * weight = here.required("weight", {in, out, 1, 1});
    const Weight * bias = with_bias ? here.required("bias", {out, 1, 1, 1}) : nullptr;

    Value operator()(Graph & g, Value x) const { return g.linear(weight, bias, x); }
};

// One matrix where diffusers has several, whose outputs lie one behind the other.
struct FusedLinear {
    struct Part {
        std::string diffusers; // below `here`
        int64_t     rows;
        bool        swap_halves = false;
    };
    Scope             here;
    int64_t           in;
    std::vector<Part> parts;

    const Weight * weight = declare("weight");
    const Weight * bias = declare("bias");

    Value operator()(Graph & g, Value x) const { return g.linear(weight, bias, x); }

  private:
    const Weight * declare(const std::string & leaf) const {
        std::vector<WeightPart> by_rows;
        int64_t                 rows = 0;
        for (const Part & part : parts) {
            by_rows.push_back({part.diffusers + (part.diffusers.empty() ? "" : ".") + leaf, rows, part.rows, part.swap_halves});
            rows += part.rows;
        }
        const Shape ne = leaf == "bias" ? Shape{rows, 1, 1, 1} : Shape{in, rows, 1, 1};
        return here.fused(leaf.c_str(), ne, std::move(by_rows));
    }
};

struct Conv2d {
    Scope   here;
    int64_t in, out;
    int     size;
    int     stride = 1;
    int     pad = size / 2;

    const Weight * weight = here.required("weight", {size, size, in, out});
    const Weight * bias = here.required("bias", {out, 1, 1, 1});

    Value operator()(Graph & g, Value x) const { return g.conv2d(weight, bias, x, stride, pad); }
};

// The 1x1 convolution around a block that changes the number of channels; none where it does not.
inline std::optional<Conv2d> shortcut_between(const Scope & here, int64_t in, int64_t out) {
    if (in == out) {
        return std::nullopt;
    }
    return Conv2d{here, in, out, 1};
}

struct GroupNorm {
    Scope   here;
    int64_t channels;
    int     groups;
    float   eps;

    const Weight * weight = here.required("weight", {channels, 1, 1, 1});
    const Weight * bias = here.required("bias", {channels, 1, 1, 1});

    Value operator()(Graph & g, Value x) const { return g.group_norm(weight, bias, x, groups, eps); }
};

struct LayerNorm {
    Scope   here;
    int64_t width;
    float   eps = 1e-5f;

    const Weight * weight = here.required("weight", {width, 1, 1, 1});
    const Weight * bias = here.required("bias", {width, 1, 1, 1});

    Value operator()(Graph & g, Value x) const { return g.layer_norm(weight, bias, x, eps); }
};

// Over the features of a head. `here` is the parameter itself, whose last name differs between layouts.
struct HeadNorm {
    Scope   here;
    int64_t width;
    float   eps = 1e-6f;

    const Weight * weight = here.required("", {width, 1, 1, 1});

    Value operator()(Graph & g, Value x) const { return g.rms_norm(weight, x, eps); }
};

struct RmsNorm {
    Scope   here;
    int64_t width;
    float   eps = 1e-6f;

    const Weight * weight = here.required("weight", {width, 1, 1, 1});

    Value operator()(Graph & g, Value x) const { return g.rms_norm(weight, x, eps); }
};

struct Embedding {
    Scope   here;
    int64_t width, rows;

    const Weight * weight = here.table("weight", width, rows);

    Value operator()(Graph & g, Value ids) const { return g.embedding(weight, ids); }
};

} // namespace sd
