#include "kernels/product.h"

#include "core/error.h"

#include <ggml.h>

#include <algorithm>
#include <cstring>
#include <limits>

namespace sd {
namespace {

// By minimal filtering more time goes into inputs, which every block of columns transforms anew, and into sums: deeper and
// wider blocks, beside which the sums lie in the third-level cache.
constexpr int64_t filtered_weights = 512 << 10, filtered_sums = 2 << 20; // bytes at a time
constexpr int64_t columns_at_most = 320;
constexpr int64_t deepest_gated = 4096; // twice a panel of it: 2 MB
constexpr int64_t rows_of_quantised = 4096;
constexpr int64_t filtered_channels = 16, filtered_rows = 64;

// What a piece of work takes beside its products, in products: a weight's unpacking KernelSet::unpacking of them, more where
// it is quantised or transformed, and each channel of a row, which is found, rounded or transformed, as many as with some
// columns.
constexpr double quantised_unpacking = 4, filtered_unpacking = 4, found = 8, transformed = 32;
constexpr double waiting = 0.25; // of a piece, which the others wait for at the end
constexpr int64_t pieces_each = 6; // at most, that a thread is to take
constexpr int64_t least_rows = 32; // of a piece: tiles of every set

int64_t taps_of(const ggml_tensor * weight) { return weight->ne[2] * weight->ne[3] > 1 ? weight->ne[0] * weight->ne[1] : 1; }
int64_t inputs_of(const ggml_tensor * weight) { return weight->ne[2] * weight->ne[3] > 1 ? weight->ne[2] : weight->ne[0]; }
int64_t outputs_of(const ggml_tensor * weight) { return weight->ne[2] * weight->ne[3] > 1 ? weight->ne[3] : weight->ne[1]; }

bool is_element(ggml_type type) { return type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_BF16; }

Element element_of(ggml_type type) {
    return type == GGML_TYPE_F16 ? Element::f16 : type == GGML_TYPE_BF16 ? Element::bf16 : Element::f32;
}

// Of a channel, for each row and column.
double multiplications(Form form, int taps) { return products_of(form, taps) / (form == Form::direct ? 1.0 : 4.0); }

size_t aligned(int64_t bytes) { return static_cast<size_t>((bytes + 63) / 64 * 64); }

const float * data(const ggml_tensor * tensor) { return static_cast<const float *>(tensor->data); }

} // namespace

bool Product::can(const ggml_tensor * weight) {
    return taps_of(weight) <= max_taps &&
           (is_element(weight->type) || (taps_of(weight) == 1 && ggml_get_type_traits(weight->type)->to_float));
}

bool Product::can_gate(const ProductParts & parts) {
    return parts.activation == Activation::none && !parts.scale && !parts.shift && !parts.residual && parts.terms.size() <= 2 &&
           outputs_of(parts.terms.front().weight) % 2 == 0 && inputs_of(parts.terms.front().weight) <= deepest_gated;
}

Product::Product(const KernelSet & kernel_set, Pool & threads, ProductParts parts)
    : Operation(kernel_set, threads), parts_(std::move(parts)) {
    const ProductTerm & first = parts_.terms.front();
    columns_ = outputs_of(first.weight) / (gated() ? 2 : 1);
    const Rows rows = rows_of(first);
    ne_ = {columns_, first.x->ne[1], first.x->ne[2], first.x->ne[3]};
    if (taps_of(first.weight) > 1 || first.stride > 1 || first.seen_width > 0) {
        ne_[1] = rows.out_width;
        ne_[2] = rows.out_height;
    }
    rows_ = ne_[1] * ne_[2] * ne_[3];
    plan_chunks();
    pool.reserve(panel_bytes_ + pack_bytes_ + row_bytes_);
}

Rows Product::rows_of(const ProductTerm & term) const {
    const ggml_tensor * x = term.x;
    const bool          kernel = taps_of(term.weight) > 1;
    Rows                rows{};
    rows.bf16 = x->type == GGML_TYPE_BF16;
    rows.pixel = x->ne[0];
    rows.width = static_cast<int>(x->ne[1]);
    rows.height = static_cast<int>(x->ne[2]);
    rows.image = rows.pixel * rows.width * rows.height;
    rows.seen_width = term.seen_width > 0 ? static_cast<int>(term.seen_width) : rows.width;
    rows.seen_height = term.seen_height > 0 ? static_cast<int>(term.seen_height) : rows.height;
    rows.taps_w = kernel ? static_cast<int>(term.weight->ne[0]) : 1;
    rows.taps_h = kernel ? static_cast<int>(term.weight->ne[1]) : 1;
    rows.stride = term.stride;
    rows.pad = term.pad;
    rows.out_width = (rows.seen_width + 2 * rows.pad - rows.taps_w) / rows.stride + 1;
    rows.zeros = zeros_.data();
    rows.out_height = (rows.seen_height + 2 * rows.pad - rows.taps_h) / rows.stride + 1;
    return rows;
}

// Where channels are few, transforming them costs more than the products that it saves; where pictures are small, weights.
Form Product::form_of(const ProductTerm & term) const {
    const Rows rows = rows_of(term);
    if (!set.winograd || rows.taps_w != 3 || rows.taps_h != 3 || rows.stride != 1 || rows.pad != 1 ||
        std::min(inputs_of(term.weight), outputs_of(term.weight)) < filtered_channels ||
        rows.out_width * rows.out_height < filtered_rows) {
        return Form::direct;
    }
    const bool doubled = rows.seen_width == 2 * rows.width && rows.seen_height == 2 * rows.height;
    return doubled ? Form::winograd_doubled : Form::winograd;
}

// ---- which weights are unpacked at a time ---------------------------------------------------------------------

void Product::plan_chunks() {
    int64_t longest = 0, taken = 0; // by the last chunk
    for (size_t term = 0; term < parts_.terms.size(); ++term) {
        const ggml_tensor * weight = parts_.terms[term].weight;
        const Form          form = form_of(parts_.terms[term]);
        const int           taps = static_cast<int>(taps_of(weight)), products = products_of(form, taps);
        const int64_t       inputs = inputs_of(weight), block = ggml_blck_size(weight->type);
        // A value meets its gate when both are complete: all at a time.
        const int     depth = form == Form::direct ? set.depth : set.depth / 3 * 4;
        const int64_t most = gated() ? inputs : std::max<int64_t>(depth / products, 16);
        const int64_t pieces = (inputs + most - 1) / most;
        // Whole vectors are transformed much faster than the rest.
        const int64_t step = std::max<int64_t>(block, form == Form::direct ? set.channel_step : set.lanes);
        const int64_t length = ((inputs + pieces - 1) / pieces + step - 1) / step * step; // of nearly the same length
        longest = std::max(longest, length);
        filtered_ = filtered_ || form != Form::direct;
        for (int64_t first = 0; first < inputs; first += length) {
            const Slice slice{term, form, taps, static_cast<int>(std::min(length, inputs - first)), first};
            // An adapter's few channels come with the last of the layer's, and sums are written once for both.
            const bool both_direct = !chunks_.empty() && form == Form::direct && chunks_.back().front().form == Form::direct;
            const bool joins = both_direct && (gated() || (chunks_.back().size() == 1 && taken + taps * slice.length <= set.depth));
            taken = products * slice.length + (joins ? taken : 0);
            if (joins) {
                chunks_.back().push_back(slice);
            } else {
                chunks_.push_back({slice});
            }
        }
    }
    zeros_.assign(static_cast<size_t>(longest), 0.0f);
    plan_pieces();
    const int64_t panels = columns_at_once_ / set.panel * (gated() ? 2 : 1);
    for (const Chunk & chunk : chunks_) {
        size_t panel_bytes = 0, row_bytes = 0;
        for (const Slice & slice : chunk) {
            panel_bytes += aligned(set.panel_bytes(slice.form, slice.taps, slice.length) * panels);
            row_bytes += aligned(set.row_scratch(slice.form, slice.taps, slice.length));
            pack_bytes_ = std::max(pack_bytes_, 2 * aligned(4 * pack_floats(slice))); // dequantised, and the set's own
        }
        panel_bytes_ = std::max(panel_bytes_, panel_bytes);
        row_bytes_ = std::max(row_bytes_, row_bytes);
    }
}

int64_t Product::pack_floats(const Slice & slice) const {
    return slice.taps * set.lanes * ((slice.length + set.channel_step - 1) / set.channel_step * set.channel_step);
}

// ---- which pieces threads take --------------------------------------------------------------------------------

// Blocks of columns whose weights fit the cache, and shares of the rows: the pair of numbers that takes the least time. Few
// pieces unpack weights and find rows less often, many keep all threads busy to the end.
void Product::plan_pieces() {
    int64_t deepest = 0; // bytes of a column of panels
    for (const Chunk & chunk : chunks_) {
        int64_t bytes = 0;
        for (const Slice & slice : chunk) {
            bytes += set.panel_bytes(slice.form, slice.taps, slice.length) * (gated() ? 2 : 1);
        }
        deepest = std::max(deepest, bytes);
    }
    const ggml_tensor * weight = parts_.terms.front().weight;
    const bool          quantised = !is_element(weight->type);
    const int64_t       threads = pool.threads(), panels = (columns_ + set.panel - 1) / set.panel;
    const int64_t       weights = filtered_ ? filtered_weights : set.weights, sums = filtered_ ? filtered_sums : set.sums;
    const int64_t       most_panels = std::clamp<int64_t>(weights / deepest, 1, columns_at_most / set.panel);
    const int64_t       most_shares = std::max<int64_t>(filtered_ ? (ne_[2] + 1) / 2 * ne_[3] : rows_ / least_rows, 1);
    const double        products = multiplications(form_of(parts_.terms.front()), static_cast<int>(taps_of(weight)));
    const double unpacking = set.unpacking * (quantised ? quantised_unpacking : 1) * (filtered_ ? filtered_unpacking : 1) *
                             static_cast<double>(taps_of(weight)) / products;
    const double beside = filtered_ ? transformed : found;

    double least = std::numeric_limits<double>::infinity();
    for (int64_t blocks = (panels + most_panels - 1) / most_panels; blocks <= panels; ++blocks) {
        const int64_t columns = (panels + blocks - 1) / blocks * set.panel, across = (columns_ + columns - 1) / columns;
        // What more channels are added to stays in the cache meanwhile.
        const int64_t rows = quantised ? rows_of_quantised : sums / (static_cast<int64_t>(sizeof(float)) * columns);
        const int64_t fewest = std::clamp<int64_t>(chunks_.size() > 1 ? rows_ / rows : 1, 1, most_shares);
        for (int64_t each = 1; each <= pieces_each; ++each) {
            const int64_t shares = std::clamp(each * threads / across, fewest, most_shares);
            const double  rows_each = static_cast<double>(rows_) / static_cast<double>(shares);
            const double  piece = rows_each * (static_cast<double>(columns) + beside) + unpacking * static_cast<double>(columns);
            const double  turns = static_cast<double>((across * shares + threads - 1) / threads) + (threads > 1 ? waiting : 0);
            if (turns * piece < least) {
                least = turns * piece;
                columns_at_once_ = columns;
                shares_ = shares;
            }
        }
    }
}

// Where one of the shares of the rows begins: at a whole tile, and of a filtered picture with an even line.
int64_t Product::row_at(int64_t share) const {
    if (!filtered_) {
        return share == shares_ ? rows_ : rows_ * share / shares_ / least_rows * least_rows;
    }
    const int64_t pairs = (ne_[2] + 1) / 2, pair = pairs * ne_[3] * share / shares_;
    return (pair / pairs * ne_[2] + pair % pairs * 2) * ne_[1];
}

// ---- unpacking ------------------------------------------------------------------------------------------------

// Rows [row, row + rows) of a weight, at most as many as a vector has lanes, become columns of a panel.
void Product::pack(const Slice & slice, int64_t row, int64_t rows, char * to, int column, float * floats, float * scratch) const {
    const ggml_tensor * weight = parts_.terms[slice.term].weight;
    const int64_t       taps = slice.taps, n = inputs_of(weight) * taps, first = slice.first * taps;
    const size_t        row_bytes = ggml_row_size(weight->type, n);
    const char *        from = static_cast<const char *>(weight->data) + static_cast<size_t>(row) * row_bytes;
    Pack                p{slice.form, from,         element_of(weight->type), n,      static_cast<int>(rows),
                          slice.taps, slice.length, to,                       column, scratch};
    if (is_element(weight->type)) {
        p.from = from + static_cast<size_t>(first) * ggml_type_size(weight->type);
    } else {
        const auto to_float = ggml_get_type_traits(weight->type)->to_float;
        for (int64_t i = 0; i < rows; ++i) {
            to_float(from + static_cast<size_t>(i) * row_bytes + ggml_row_size(weight->type, first), floats + i * slice.length,
                     slice.length);
        }
        p.from = floats;
        p.row = slice.length;
    }
    set.pack(p);
}

void Product::pack_columns(const Slice & slice, const Piece & piece, char * panels, char * scratch) const {
    const int64_t bytes = set.panel_bytes(slice.form, slice.taps, slice.length);
    const int64_t halves = gated() ? 2 : 1;
    auto *        floats = reinterpret_cast<float *>(scratch);
    float *       own = floats + pack_floats(slice);
    for (int64_t column = piece.first_column; column < piece.end_column; column += set.panel) {
        for (int64_t half = 0; half < halves; ++half, panels += bytes) {
            for (int64_t at = 0; at < set.panel; at += set.lanes) {
                const int64_t rows = std::clamp<int64_t>(columns_ - column - at, 0, set.lanes);
                pack(slice, half * columns_ + std::min(column + at, columns_ - 1), rows, panels, static_cast<int>(at), floats, own);
            }
        }
    }
}

// ---- multiplying ----------------------------------------------------------------------------------------------

void Product::work(ggml_tensor * out, const Piece & piece, int thread) {
    auto *     panels = static_cast<char *>(pool.scratch(thread, panel_bytes_ + pack_bytes_ + row_bytes_));
    char *     pack_scratch = panels + panel_bytes_;
    const auto at_column = [&](const ggml_tensor * tensor) { return tensor ? data(tensor) + piece.first_column : nullptr; };
    const auto per_image = [&](const ggml_tensor * tensor) {
        return tensor && ggml_nelements(tensor) > columns_ ? columns_ : int64_t{0};
    };
    const ggml_tensor * many = per_image(parts_.scale) > 0 ? parts_.scale : parts_.shift;
    Epilogue            epilogue{};
    epilogue.bias = at_column(parts_.bias);
    epilogue.gate_bias = parts_.bias ? epilogue.bias + columns_ : nullptr;
    epilogue.activation = parts_.activation;
    epilogue.scale = at_column(parts_.scale);
    epilogue.scale_image = per_image(parts_.scale);
    epilogue.shift = at_column(parts_.shift);
    epilogue.shift_image = per_image(parts_.shift);
    epilogue.residual = at_column(parts_.residual);
    epilogue.residual_row = columns_;
    epilogue.rows_per_image = many ? rows_ / std::max<int64_t>(ggml_nelements(many) / columns_, 1) : rows_;

    Block block{};
    block.first_row = piece.first_row;
    block.end_row = piece.end_row;
    block.y = activations(out);
    block.y_row = columns_;
    block.y_column = piece.first_column;
    block.columns = static_cast<int>(piece.end_column - piece.first_column);
    block.epilogue = &epilogue;
    block.scratch = pack_scratch + pack_bytes_;
    for (size_t i = 0; i < chunks_.size(); ++i) {
        char * to = panels;
        block.count = 0;
        for (const Slice & slice : chunks_[i]) {
            pack_columns(slice, piece, to, pack_scratch);
            Operand & operand = block.operands[block.count++];
            operand = {slice.form, rows_of(parts_.terms[slice.term]), static_cast<int>(slice.first), slice.length, to};
            operand.rows.x = parts_.terms[slice.term].x->data;
            to += aligned(set.panel_bytes(slice.form, slice.taps, slice.length) * (columns_at_once_ / set.panel) * (gated() ? 2 : 1));
        }
        block.first = i == 0;
        block.last = i + 1 == chunks_.size();
        set.product(block);
    }
}

void Product::run(ggml_tensor * out) {
    const int64_t columns = columns_at_once_, across = (columns_ + columns - 1) / columns;
    pool.run(across * shares_, flops(), [&](int64_t number, int thread) {
        const int64_t row = number / across, column = number % across;
        work(out, {row_at(row), row_at(row + 1), column * columns, std::min((column + 1) * columns, columns_)}, thread);
    });
}

ggml_tensor * Product::append_to(ggml_context * ctx) {
    std::vector<ggml_tensor *> sources;
    for (const ProductTerm & term : parts_.terms) {
        sources.push_back(term.x);
    }
    for (ggml_tensor * tensor : {parts_.bias, parts_.scale, parts_.shift, parts_.residual}) {
        if (tensor) {
            sources.push_back(tensor);
        }
    }
    return append(ctx, ne_, std::move(sources));
}

// Sums that are added to lie in f32 until they are complete; gated ones come complete.
std::unique_ptr<Operation> Product::narrowed() const {
    if (!gated()) {
        return nullptr;
    }
    auto twin = std::make_unique<Product>(set, pool, parts_);
    twin->narrow_ = true;
    return twin;
}

std::string Product::describe() const {
    const ggml_tensor * weight = parts_.terms.front().weight;
    std::string         kind = "product";
    if (taps_of(weight) > 1) {
        kind = text("convolution %lldx%lld", static_cast<long long>(weight->ne[0]), static_cast<long long>(weight->ne[1]));
        kind += form_of(parts_.terms.front()) == Form::direct ? "" : " (Winograd)";
    }
    return text("%s %lld -> %lld%s, %lld rows, %s", kind.c_str(), static_cast<long long>(inputs_of(weight)),
                static_cast<long long>(outputs_of(weight)), parts_.terms.size() > 1 ? " with adapters" : "",
                static_cast<long long>(rows_), ggml_type_name(weight->type));
}

double Product::flops() const {
    double flops = 0;
    for (const ProductTerm & term : parts_.terms) {
        flops += 2.0 * multiplications(form_of(term), static_cast<int>(taps_of(term.weight))) *
                 static_cast<double>(rows_ * inputs_of(term.weight) * outputs_of(term.weight));
    }
    return flops;
}

} // namespace sd
