// A kernel set: the inner loops of CPU operations, compiled once per instruction set and chosen at run time.
// Plain structs and function pointers only, for what a set's file compiles must not leak into others; see simd.h.
#pragma once

#include <cstdint>

namespace sd {

// How a weight meets its rows: tap by tap, or, of 3x3 taps, stride 1 and one pixel of padding, by minimal filtering, which
// multiplies 16 times for four results in the place of 36, and 9 times where x is enlarged to twice its size.
enum class Form { direct, winograd, winograd_doubled };

// Of one channel and column, for one result or, by minimal filtering, four.
static constexpr int products_of(Form form, int taps) {
    return form == Form::winograd ? 16 : form == Form::winograd_doubled ? 9 : taps;
}

enum class Activation { none, silu, gelu, quick_gelu, gelu_tanh, geglu };

// Activations, in f32, or in bf16 where a set's products round them to it anyway.
struct Activations {
    void * data = nullptr;
    bool   bf16 = false;
};

// The left operand of a product: a row of channels per output pixel and tap. Tokens are a picture one pixel high.
struct Rows {
    const void *  x;                 // [channels, width, height, images]
    bool          bf16;              // in a set whose products are; channels are even then
    int64_t       pixel, image;      // elements from one to the next
    int           width, height;     // of x
    int           seen_width, seen_height; // x is enlarged to this, nearest; else the same
    int           out_width, out_height;
    int           taps_w = 1, taps_h = 1, stride = 1, pad = 0;
    const void *  zeros;             // as many as there are channels: what lies outside of x
};

constexpr int max_taps = 64;

// What becomes of a sum, in this order; null pointers are left out. All begin at the block's first column.
struct Epilogue {
    const float * bias;      // [n]
    const float * gate_bias; // [n], of the gating half
    Activation    activation;
    const float * scale;     // [n, images], floats from one image to the next
    int64_t       scale_image;
    const float * shift;     // [n, images]
    int64_t       shift_image;
    const float * residual;  // [n, rows]
    int64_t       residual_row;
    int64_t       rows_per_image;
};

// Rows and the panels that they meet: channels [c0, c0 + length) of every tap.
struct Operand {
    Form         form;
    Rows         rows;
    int          c0, length;
    const void * panels; // as pack() left them; those of the next column KernelSet::panel_bytes() further
};

// y[row, column] (+)= sum over operands, taps and channels of rows times panels.
struct Block {
    Operand          operands[2];
    int              count = 1; // of operands; one of another form than direct is alone
    int64_t          first_row, end_row; // of another form than direct the ends of pairs of lines
    Activations      y;       // bf16 only where all comes in one block, of which nothing is read again
    int64_t          y_row;   // elements from one row to the next
    int64_t          y_column; // the block's first
    int              columns; // that there are; panels are filled up with zeros
    bool             first, last;
    const Epilogue * epilogue; // after the last
    void *           scratch;  // KernelSet::row_scratch(...) bytes of each operand
};

enum class Element { f32, f16, bf16 };

// Columns of a panel from as many rows of a weight: [channels * taps] each, of which `length` channels are taken.
struct Pack {
    Form         form;
    const void * from;    // at the first channel
    Element      element;
    int64_t      row;     // elements from one row to the next
    int          rows;    // that there are, at most `lanes`
    int          taps, length;
    void *       to;      // the panel
    int          column;  // where in it
    float *      scratch; // taps * lanes floats of each of `length` channels, filled up to whole channel_steps
};

// softmax(q k^T scale + mask) v of one head of one picture.
struct Head {
    const float * q, * k, * v; // [size, tokens]
    Activations   out;         // [size, queries]
    int64_t       out_column;  // elements of `out` before the head's first
    int64_t       q_row, k_row, v_row, out_row; // floats from one token to the next
    const float * mask;        // [keys, queries] or null
    int64_t       mask_row;
    int64_t       first_query, end_query, keys;
    int           size;
    float         scale;
    void *        scratch;     // KernelSet::head_scratch(...) bytes
};

struct KernelSet {
    const char * name;
    int          lanes, panel; // floats in a vector, columns in a panel
    int          depth;        // channels times taps that are unpacked and multiplied at a time
    int          unpacking;    // rows that are multiplied by a weight while another is unpacked
    int64_t      weights, sums; // bytes that are unpacked, and added to, while rows pass by: they stay in a cache
    int          channel_step; // numbers of channels that are no multiples are filled up with zeros
    bool         bf16;         // products of bf16, summed in f32
    bool         winograd;     // whether there are forms beside the direct one

    int64_t (*panel_bytes)(Form form, int taps, int length); // of one panel
    int64_t (*row_scratch)(Form form, int taps, int length);
    void (*pack)(const Pack &);
    void (*product)(const Block &);

    int64_t (*head_scratch)(int64_t keys, int size);
    void (*attention)(const Head &);

    // Sums over `rows` rows of [channels]: mean and sum of squared distances from it, per channel.
    void (*moments)(const float * x, int64_t rows, int64_t row, int64_t channels, float * mean, float * squares);
    // y = activation((x - centre) * scale + shift), per channel; y begins at its element `first`.
    void (*affine)(const float * x, Activations y, int64_t first, int64_t rows, int64_t channels, const float * centre,
                   const float * scale, const float * shift, Activation activation);
    // (x - mean) / sqrt(variance + eps) * weight + bias of each row; of RMS norms without the mean, weight and bias may be null.
    void (*normalise)(const float * x, Activations y, int64_t first, int64_t rows, int64_t channels, const float * weight, const float * bias,
                      float eps, bool rms);
    void (*activate)(const float * x, float * y, int64_t n, Activation activation);
    void (*add)(const float * x, const float * y, float * to, int64_t n);
};

} // namespace sd
