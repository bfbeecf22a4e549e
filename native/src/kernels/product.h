// Products with weights: linear layers and convolutions, with what follows them.
#pragma once

#include "kernels/operation.h"

namespace sd {

// One addend of a product: weight times x.
struct ProductTerm {
    const ggml_tensor * weight;          // [in, out] or [kw, kh, in, out], of any type
    ggml_tensor *       x;               // tokens [in, T, N], or pictures [in, W, H, N]; contiguous f32
    int                 stride = 1, pad = 0;
    int64_t             seen_width = 0, seen_height = 0; // x is enlarged to this before, nearest; 0: it is not
};

// ((sum of terms + bias) activated) * scale + shift + residual. All but the terms may be null.
struct ProductParts {
    std::vector<ProductTerm> terms;
    ggml_tensor *            bias = nullptr; // [out]
    Activation               activation = Activation::none;
    ggml_tensor *            scale = nullptr;    // [out] or [out, images]
    ggml_tensor *            shift = nullptr;    // [out] or [out, images]
    ggml_tensor *            residual = nullptr; // as the result
};

class Product final : public Operation {
  public:
    // With the activation geglu the weight's first half of rows are values and the second their gates.
    Product(const KernelSet & kernel_set, Pool & threads, ProductParts parts);

    // Whether products with this weight can be made here at all.
    static bool can(const ggml_tensor * weight);

    // Whether the activation may become geglu, which wants all of the weight at a time.
    static bool can_gate(const ProductParts & parts);

    ggml_tensor * append_to(ggml_context * ctx) override;
    void          run(ggml_tensor * out) override;
    std::string   describe() const override;
    std::unique_ptr<Operation> narrowed() const override;
    double        flops() const override;

    const ProductParts & parts() const { return parts_; }

  private:
    struct Slice { // some input channels of a term
        size_t  term;
        Form    form;
        int     taps, length;
        int64_t first;
    };
    using Chunk = std::vector<Slice>; // what is unpacked and multiplied at a time, one slice or two
    struct Piece { // what one thread does at a time
        int64_t first_row, end_row, first_column, end_column;
    };

    Rows    rows_of(const ProductTerm & term) const;
    Form    form_of(const ProductTerm & term) const;
    int64_t row_at(int64_t share) const;
    void    plan_chunks();
    void    plan_pieces();
    int64_t pack_floats(const Slice & slice) const;
    void    pack(const Slice & slice, int64_t row, int64_t rows, char * to, int column, float * floats, float * scratch) const;
    void    pack_columns(const Slice & slice, const Piece & piece, char * panels, char * scratch) const;
    bool    gated() const { return parts_.activation == Activation::geglu; }
    void    work(ggml_tensor * out, const Piece & piece, int thread);

    ProductParts           parts_;
    std::array<int64_t, 4> ne_{};      // of the result
    int64_t                columns_;   // of the result
    int64_t                columns_at_once_ = 0; // whole panels
    int64_t                shares_ = 1; // of the rows
    int64_t                rows_ = 0;  // of the result
    std::vector<Chunk>     chunks_;
    bool                   filtered_ = false; // some of them by minimal filtering
    std::vector<float>     zeros_;
    size_t                 panel_bytes_ = 0, pack_bytes_ = 0, row_bytes_ = 0; // of scratch
};

} // namespace sd
