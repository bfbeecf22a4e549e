#include "kernels/norm.h"

#include "core/error.h"

#include <ggml.h>

#include <algorithm>
#include <cmath>

namespace sd {
namespace {

constexpr int64_t pixels_at_once = 64; // whose statistics are taken by two passes over the cache

const float * data(const ggml_tensor * tensor) { return static_cast<const float *>(tensor->data); }

// The vector for one picture of [n], or [n, images].
const float * of_image(const ggml_tensor * vector, int64_t n, int64_t image) {
    return !vector ? nullptr : data(vector) + (ggml_nelements(vector) > n ? image * n : 0);
}

} // namespace

GroupNormOperation::GroupNormOperation(const KernelSet & kernel_set, Pool & threads, ggml_tensor * x, ggml_tensor * weight,
                                       ggml_tensor * bias, int groups, float eps, Activation activation)
    : Operation(kernel_set, threads), x_(x), weight_(weight), bias_(bias), groups_(groups), eps_(eps), activation_(activation),
      channels_(x->ne[0]), pixels_(x->ne[1] * x->ne[2]), images_(x->ne[3]),
      parts_((pixels_ + pixels_at_once - 1) / pixels_at_once) {
    centres_.resize(static_cast<size_t>(channels_ * images_));
    scales_.resize(centres_.size());
    moments();
}

// A thirty-second of the picture: all norms of a graph use the same memory.
GroupNormOperation::Moments GroupNormOperation::moments() const {
    const auto n = static_cast<size_t>(channels_ * parts_ * images_);
    auto *     means = static_cast<float *>(pool.scratch(0, 2 * n * sizeof(float)));
    return {means, means + n};
}

std::unique_ptr<GroupNormOperation> GroupNormOperation::with(Activation activation) const {
    return std::make_unique<GroupNormOperation>(set, pool, x_, weight_, bias_, groups_, eps_, activation);
}

ggml_tensor * GroupNormOperation::append_to(ggml_context * ctx) {
    return append(ctx, {x_->ne[0], x_->ne[1], x_->ne[2], x_->ne[3]}, {x_, weight_, bias_});
}

// Joins the moments of parts and channels (Chan, Golub and LeVeque, 1979): their means differ from the group's.
void GroupNormOperation::factors(int64_t image, const Moments & moments) {
    const int64_t size = channels_ / groups_;
    const float * means = moments.means + image * parts_ * channels_;
    const float * squares = moments.squares + image * parts_ * channels_;
    const float * weight = of_image(weight_, channels_, image);
    const auto    pixels_of = [&](int64_t part) { return static_cast<double>(std::min(pixels_at_once, pixels_ - part * pixels_at_once)); };
    for (int64_t group = 0; group < groups_; ++group) {
        const int64_t first = group * size, end = first + size;
        double        mean = 0, variance = 0;
        for (int64_t part = 0; part < parts_; ++part) {
            double sum = 0;
            for (int64_t c = first; c < end; ++c) {
                sum += static_cast<double>(means[part * channels_ + c]);
            }
            mean += sum * pixels_of(part);
        }
        const double n = static_cast<double>(pixels_ * size);
        mean /= n;
        for (int64_t part = 0; part < parts_; ++part) {
            for (int64_t c = first; c < end; ++c) {
                const double off = static_cast<double>(means[part * channels_ + c]) - mean;
                variance += static_cast<double>(squares[part * channels_ + c]) + off * off * pixels_of(part);
            }
        }
        const double scale = 1 / std::sqrt(variance / n + static_cast<double>(eps_));
        for (int64_t c = first; c < end; ++c) {
            centres_[static_cast<size_t>(image * channels_ + c)] = static_cast<float>(mean);
            scales_[static_cast<size_t>(image * channels_ + c)] = static_cast<float>(scale * static_cast<double>(weight[c]));
        }
    }
}

void GroupNormOperation::run(ggml_tensor * out) {
    const float * x = data(x_);
    const int64_t picture = pixels_ * channels_;
    const Moments of = moments();
    const auto    rows = [&](int64_t part) { return std::min(pixels_at_once, pixels_ - part * pixels_at_once); };
    const double passes = 8.0 * static_cast<double>(picture * images_); // of memory count more than sums
    pool.run(images_ * parts_, passes, [&](int64_t piece, int) {
        const int64_t image = piece / parts_, part = piece % parts_;
        set.moments(x + image * picture + part * pixels_at_once * channels_, rows(part), channels_, channels_,
                    of.means + piece * channels_, of.squares + piece * channels_);
    });
    pool.run(images_, 8.0 * static_cast<double>(channels_ * parts_ * images_),
             [&](int64_t image, int) { factors(image, of); });
    pool.run(images_ * parts_, passes, [&](int64_t piece, int) {
        const int64_t image = piece / parts_, part = piece % parts_;
        const int64_t at = image * picture + part * pixels_at_once * channels_;
        set.affine(x + at, activations(out), at, rows(part), channels_, centres_.data() + image * channels_,
                   scales_.data() + image * channels_, of_image(bias_, channels_, image), activation_);
    });
}

ggml_tensor * RowNorm::append_to(ggml_context * ctx) {
    std::vector<ggml_tensor *> sources{x_};
    for (ggml_tensor * vector : {weight_, bias_}) {
        if (vector) {
            sources.push_back(vector);
        }
    }
    return append(ctx, {x_->ne[0], x_->ne[1], x_->ne[2], x_->ne[3]}, std::move(sources));
}

void RowNorm::run(ggml_tensor * out) {
    const int64_t channels = x_->ne[0], rows = ggml_nelements(x_) / channels;
    const int64_t images = std::max(weight_ ? ggml_nelements(weight_) / channels : 1, bias_ ? ggml_nelements(bias_) / channels : 1);
    const int64_t of_one = rows / images; // rows of one picture
    const int64_t parts = (of_one + pixels_at_once - 1) / pixels_at_once;
    pool.run(images * parts, 16.0 * static_cast<double>(rows * channels), [&](int64_t piece, int) {
        const int64_t image = piece / parts, first = piece % parts * pixels_at_once;
        const int64_t at = (image * of_one + first) * channels;
        set.normalise(data(x_) + at, activations(out), at, std::min(pixels_at_once, of_one - first), channels,
                      of_image(weight_, channels, image), of_image(bias_, channels, image), eps_, rms_);
    });
}

std::unique_ptr<Operation> GroupNormOperation::narrowed() const {
    auto twin = with(activation_);
    twin->narrow_ = true;
    return twin;
}

std::unique_ptr<Operation> RowNorm::narrowed() const {
    auto twin = std::make_unique<RowNorm>(set, pool, x_, weight_, bias_, eps_, rms_);
    twin->narrow_ = true;
    return twin;
}

std::string GroupNormOperation::describe() const { return text("group norm of %lld channels", static_cast<long long>(channels_)); }

std::string RowNorm::describe() const {
    return text("%s norm of %lld channels", rms_ ? "rms" : "layer", static_cast<long long>(x_->ne[0]));
}

} // namespace sd
