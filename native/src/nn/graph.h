// Appending operations: the only place where a node of a ggml graph is made. Networks are written against this
// interface, so that a kernel, an activation layout or an adapter is decided here and nowhere else.
//
// Shapes in comments are ggml's, the fastest dimension first: an image is [W, H, C, N], tokens are [C, T, N].
#pragma once

#include "core/tensor.h"

#include <array>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

struct ggml_cgraph;
struct ggml_context;
struct ggml_tensor;

namespace sd {

struct Adapter;
struct Weight;
class Adapters;
class Device;
class KernelNodes;

using Value = ggml_tensor *;

class Graph {
  public:
    using Shapes = std::map<std::string, Shape>;

    // `adapters` may be null; where they act, the inputs have their "strengths" [entries, images or 1].
    Graph(ggml_context * ctx, ggml_cgraph * nodes, const Device & device, const Shapes & inputs,
          const Adapters * adapters = nullptr);
    ~Graph();
    Graph(const Graph &) = delete;
    Graph & operator=(const Graph &) = delete;

    // Written before each run, by name; the run's inputs state the shapes.
    Value input(const std::string & name);
    Value input_ids(const std::string & name); // whole numbers
    bool  has_input(const std::string & name) const { return input_shapes_.count(name) > 0; }
    // Written before each run with the same values.
    Value constant(Tensor values);
    Value constant_ids(Tensor values); // whole numbers
    // Read after each run, by name.
    void output(const std::string & name, Value value);

    // Products with weights; an adapter on a weight acts here, see adapted.cpp.
    Value linear(const Weight * weight, const Weight * bias, Value x);                      // [in, T, N] -> [out, T, N]
    Value linear_of_large(const Weight * weight, Value x); // the same for x beyond 65504, the largest number in half precision
    Value conv2d(const Weight * kernel, const Weight * bias, Value x, int stride, int pad); // [W, H, in, N] -> [W', H', out, N]
    Value embedding(const Weight * table, Value ids);                                       // [n, N] -> [width, n, N]

    Value group_norm(const Weight * weight, const Weight * bias, Value x, int groups, float eps); // [W, H, C, N]
    Value layer_norm(const Weight * weight, const Weight * bias, Value x, float eps);             // [C, T, N]

    Value silu(Value x);
    Value gelu(Value x); // with erf
    Value quick_gelu(Value x);
    Value geglu(Value x); // [2C, T, N]: the first half times the gelu of the second -> [C, T, N]

    Value add(Value x, Value y);          // y may be broadcast over trailing dimensions
    Value add_to_channels(Value x, Value y); // [W, H, C, N] + [C, N]
    Value mul(Value x, Value y);          // y may be broadcast over trailing dimensions

    // softmax(q k^T / sqrt(head size)) v, heads side by side: [C, Tq, N], [C, Tk, N] twice -> [C, Tq, N].
    // `mask` is added to the scores: [Tk, Tq], or [Tk, Tq, heads, 1 or N] where heads differ, or null.
    Value attention(Value q, Value k, Value v, int64_t heads, Value mask = nullptr);
    // The same with another factor than 1 / sqrt(head size).
    Value attention_scaled(Value q, Value k, Value v, int64_t heads, float scale, Value mask = nullptr);
    // What heads add to their scores by the distance of tokens, [heads, Tk, Tq], as a mask: [Tk, Tq, heads]; with
    // `seen` [Tk, N], 1 or 0, nothing looks at tokens that are 0: [Tk, Tq, heads, N].
    Value mask_by_head(Value bias, Value seen = nullptr);

    // A picture as the host has it, plane by plane [W, H, C, N], in the layout in which pictures lie in this graph, and
    // back. Between the two nothing but the operations of this class may look inside a picture.
    Value picture(Value planes);
    Value planes(Value picture);
    // Its width and height.
    std::array<int64_t, 2> size(Value picture) const;

    Value concat_channels(Value x, Value y);            // images
    Value concat_features(Value x, Value y);            // [C, T, N] and [D, T, N] -> [C + D, T, N]
    Value part(Value x, int64_t first, int64_t n);      // features: [C, T, N] -> [n, T, N], a view
    Value gather(Value x, Value ids);                   // tokens, counted through all images: [C, T, N] -> [C, ids]
    Value flatten(Value x, int64_t n);                  // each n rows side by side: [C, n * N] -> [C * n, N]
    Value upsample(Value x, int64_t width, int64_t height); // to this size, nearest
    Value pad(Value x, int right, int bottom);          // zeros behind the last column and row
    Value tokens(Value x);                              // [W, H, C, N] -> [C, W*H, N]
    Value image(Value x, int64_t width, int64_t height); // its inverse

    // Sinusoidal features of timesteps, cosines first: [N] -> [width, N].
    Value timestep_embedding(Value timesteps, int64_t width);

    // Diffusion transformers, see graph_transformer.cpp. Tokens are [C, T, N], tokens by heads [size, heads, T, N].
    Value gelu_tanh(Value x);                                   // by the tanh formula, but without ggml's table
    Value scaled(Value x, float factor);
    Value normalise(Value x, float eps);                        // each token to mean 0 and variance 1
    Value rms_norm(const Weight * weight, Value x, float eps);  // each run of the first dimension
    Value chunk(Value vectors, int64_t index, int64_t width);   // [n * width, N] -> the index-th [width, 1, N]
    Value modulate(Value x, Value shift, Value scale);          // x (1 + scale) + shift; those are [C, 1, N]
    Value add_gated(Value x, Value y, Value gate);              // x + gate y
    Value by_heads(Value x, int64_t heads);                     // [C, T, N] -> [C / heads, heads, T, N], a view
    Value side_by_side(Value x);                                // its inverse
    Value token_range(Value x, int64_t first, int64_t n);       // [C, T, N] -> [C, n, N], a view
    Value concat(Value x, Value y, int dimension);
    // Turns pairs of neighbours by angles position / period (Su et al., 2021): x [size, heads, T, N], positions
    // [T] whole numbers, periods [size / 2].
    Value rope(Value x, Value positions, Value periods);
    // Squares of 2 x 2 cells as tokens: [W, H, C, N] -> [4 C, W/2 H/2, N], channels outermost; and its inverse, also
    // for channels innermost.
    Value patches(Value x);
    Value from_patches(Value x, int64_t width, int64_t height, bool channels_first);

    static Shape shape(Value value);

    // What a node of the graph is, and how many additions and multiplications it makes, where these count.
    std::pair<std::string, double> describe(const ggml_tensor * node) const;

    struct Constant {
        Value  value;
        Tensor values;
    };
    const std::map<std::string, Value> & inputs() const { return inputs_; }
    // What each matrix is multiplied with: [in, ...].
    const std::vector<std::pair<const Weight *, Value>> & multiplied() const { return multiplied_; }
    const std::map<std::string, Value> & outputs() const { return outputs_; }
    // All weights that it refers to.
    const std::set<const Weight *> &     weights() const { return weights_; }
    const std::vector<Constant> &        constants() const { return constants_; }

  private:
    const Shape & shape_of(const std::string & input) const;
    Value         attention_block(Value q, Value k, Value v, float scale, Value mask);

    // What adapters make of products, see graph_adapters.cpp. A vector comes as [n], or as [n, images].
    const Adapter * adapter(const Weight * weight) const;
    ggml_tensor *   resident(const Weight * weight);
    Value           strengths();
    Value           entry_strengths(int64_t first, int64_t n);
    Value           token_strengths(int64_t first, int64_t n, Value x);
    Value           channel_strengths(int64_t first, int64_t n);
    Value           weighted_sum(Value vectors, int64_t first);
    Value           vector(const Weight * weight);
    Value           over_tokens(Value vector, Value x);
    Value           over_channels(Value vector);
    Value           multiply(ggml_tensor * weight, Value x);
    Value           multiply(ggml_tensor * kernel, Value x, int stride, int pad);
    Value           plain_conv2d(ggml_tensor * kernel, Value x, int stride, int pad);
    Value           own_inputs(const Adapter * adapted, const Weight * weight, Value x);
    bool            low_rank_at_most(const Adapter * adapter) const;
    Value           fused(const Adapter * adapter, const Weight * weight, const Weight * bias, Value x, int stride, int pad);
    Value           kronecker(Value a, Value b, Value x, Value like);
    Value           adapted_linear(const Adapter & adapter, const Weight * weight, Value x);
    Value           adapted_conv2d(const Adapter & adapter, const Weight * kernel, Value x, int stride, int pad);
    Value           adapted_rows(const Adapter & adapter, const Weight * table, Value ids, const Shape & ne);

    ggml_context *               ctx_;
    ggml_cgraph *                nodes_;
    const Device &               device_;
    const Shapes &               input_shapes_;
    const Adapters *             adapters_;
    std::unique_ptr<KernelNodes> kernels_; // null: ggml's own operations
    Value                        strengths_ = nullptr;
    std::map<std::string, Value> inputs_, outputs_;
    std::vector<std::pair<const Weight *, Value>> multiplied_;
    std::set<const Weight *>     weights_;
    std::vector<Constant>        constants_;
};

} // namespace sd
