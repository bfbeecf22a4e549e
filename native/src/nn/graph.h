// Appending operations: the only place where a node of a ggml graph is made. Networks are written against this
// interface, so that a kernel, an activation layout or an adapter is decided here and nowhere else.
//
// Shapes in comments are ggml's, the fastest dimension first: an image is [W, H, C, N], tokens are [C, T, N].
#pragma once

#include "core/tensor.h"

#include <array>
#include <map>
#include <memory>
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
    // Tokens [C, T, N] times 1 where they stay and times 0 where others stand for them: keep [1, T, N], others [C, T, N].
    Value replace_tokens(Value x, Value keep, Value others);

    // softmax(q k^T / sqrt(head size)) v, heads side by side: [C, Tq, N], [C, Tk, N] twice -> [C, Tq, N].
    // `mask` is added to the scores: [Tk, Tq], or null.
    Value attention(Value q, Value k, Value v, int64_t heads, Value mask = nullptr);

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
    const std::vector<Constant> &        constants() const { return constants_; }

  private:
    const Shape & shape_of(const std::string & input) const;
    Value         attention_block(Value q, Value k, Value v, float scale, Value mask);

    // What adapters make of products, see graph_adapters.cpp. A vector comes as [n], or as [n, images].
    const Adapter * adapter(const Weight * weight) const;
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
    std::vector<Constant>        constants_;
};

} // namespace sd
