#include "kernels/attention.h"

#include "core/error.h"

#include <ggml.h>

#include <algorithm>

namespace sd {

// Keys are packed once per piece, so a piece has many queries.
constexpr int64_t queries_at_least = 512;

static const float * data(const ggml_tensor * tensor) { return static_cast<const float *>(tensor->data); }

Attention::Attention(const KernelSet & kernel_set, Pool & threads, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v,
                     int64_t heads, float scale, ggml_tensor * mask)
    : Operation(kernel_set, threads), q_(q), k_(k), v_(v), mask_(mask), heads_(heads), scale_(scale) {
    pool.reserve(static_cast<size_t>(set.head_scratch(k->ne[1], static_cast<int>(q->ne[0] / heads))));
}

ggml_tensor * Attention::append_to(ggml_context * ctx) {
    std::vector<ggml_tensor *> sources{q_, k_, v_};
    if (mask_) {
        sources.push_back(mask_);
    }
    return append(ctx, {q_->ne[0], q_->ne[1], q_->ne[2], 1}, std::move(sources));
}

void Attention::run(ggml_tensor * out) {
    const int64_t width = q_->ne[0], size = width / heads_, queries = q_->ne[1], keys = k_->ne[1], images = q_->ne[2];
    const int64_t wanted = pool.threads() > 1 ? (4 * pool.threads() + heads_ * images - 1) / (heads_ * images) : 1;
    const int64_t parts = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(queries / queries_at_least, 1));
    pool.run(heads_ * images * parts, 2 * flops(), [&](int64_t piece, int thread) { // exponentials count as much
        const int64_t part = piece % parts, head = piece / parts % heads_, image = piece / parts / heads_;
        Head          h{};
        h.q = data(q_) + image * queries * width + head * size;
        h.k = data(k_) + image * keys * width + head * size;
        h.v = data(v_) + image * keys * width + head * size;
        h.out = activations(out);
        h.out_column = image * queries * width + head * size;
        h.q_row = h.k_row = h.v_row = h.out_row = width;
        h.mask = mask_ ? data(mask_) + (mask_->ne[2] > 1 ? head * keys * queries : 0) : nullptr;
        h.mask_row = keys;
        h.first_query = queries * part / parts;
        h.end_query = queries * (part + 1) / parts;
        h.keys = keys;
        h.size = static_cast<int>(size);
        h.scale = scale_;
        h.scratch = pool.scratch(thread, static_cast<size_t>(set.head_scratch(keys, h.size)));
        set.attention(h);
    });
}

std::unique_ptr<Operation> Attention::narrowed() const {
    auto twin = std::make_unique<Attention>(set, pool, q_, k_, v_, heads_, scale_, mask_);
    twin->narrow_ = true;
    return twin;
}

std::string Attention::describe() const {
    return text("attention %lld x %lld, %lld heads of %lld, %lld images", static_cast<long long>(q_->ne[1]),
                static_cast<long long>(k_->ne[1]), static_cast<long long>(heads_), static_cast<long long>(q_->ne[0] / heads_),
                static_cast<long long>(q_->ne[2]));
}

double Attention::flops() const { // q k^T and its product with v
    return 4.0 * static_cast<double>(q_->ne[0] * q_->ne[1] * k_->ne[1] * q_->ne[2]);
}

} // namespace sd
