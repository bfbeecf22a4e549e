#include "nn/weights.h"

#include "core/error.h"
#include "core/half.h"
#include "core/hash.h"
#include "nn/device.h"

#include <ggml-backend.h>
#include <ggml-cpp.h>
#include <ggml.h>

#include <algorithm>
#include <map>
#include <unordered_set>

namespace sd {

static_assert(static_cast<int>(DType::f32) == GGML_TYPE_F32 && static_cast<int>(DType::f16) == GGML_TYPE_F16 &&
                  static_cast<int>(DType::q8_0) == GGML_TYPE_Q8_0 &&
                  static_cast<int>(DType::q6_k) == GGML_TYPE_Q6_K &&
                  static_cast<int>(DType::iq4_xs) == GGML_TYPE_IQ4_XS &&
                  static_cast<int>(DType::bf16) == GGML_TYPE_BF16 &&
                  static_cast<int>(DType::q2_0) == GGML_TYPE_Q2_0,
              "DType carries ggml's own numbers");

namespace {

std::string shape_text(const Shape & ne) {
    int dims = 4;
    while (dims > 1 && ne[dims - 1] == 1) {
        --dims;
    }
    std::string out;
    for (int i = dims - 1; i >= 0; --i) { // as numpy and safetensors print it: the slowest first
        out += text("%s%lld", out.empty() ? "" : "x", static_cast<long long>(ne[i]));
    }
    return out;
}

// A 1x1 convolution's kernel [1, 1, in, out] is the matrix [in, out]: the same elements in the same order.
Shape squeezed(const Shape & ne) {
    Shape out{1, 1, 1, 1};
    int   at = 0;
    for (const int64_t n : ne) {
        if (n != 1) {
            out[at++] = n;
        }
    }
    return out;
}

bool is_weight_type(DType type) {
    switch (type) {
        case DType::i8: case DType::i16: case DType::i32: case DType::i64: case DType::boolean:
        case DType::u8: case DType::u16: case DType::u32: case DType::u64:
        case DType::q8_1: case DType::q8_k: // ggml's types of activations
            return false;
        default:
            return true;
    }
}

} // namespace

const char * resident_type_name(const Weight & weight) { return ggml_type_name(weight.tensor->type); }

// ---- Scope ---------------------------------------------------------------------------------------------

static std::string join(const std::string & path, const std::string & leaf) {
    return path.empty() || leaf.empty() ? path + leaf : path + "." + leaf;
}

Scope Scope::at(const std::string & name, const std::string & diffusers) const {
    Scope out{store_, component_, join(name_, name), join(diffusers_, diffusers)};
    out.wide_ = wide_;
    return out;
}

Scope Scope::wide() const {
    Scope out = *this;
    out.wide_ = true;
    return out;
}

Weight Scope::weight(const char * leaf, const Shape & ne) const {
    Weight out{join(name_, leaf), join(diffusers_, leaf), ne};
    out.component = component_;
    out.wide = wide_;
    return out;
}

const StoredTensor * Scope::find(const char * leaf) const {
    for (const std::string * path : {&name_, &diffusers_}) {
        if (!path->empty()) {
            if (const StoredTensor * stored = store_->checkpoint().find(join(*path, leaf))) {
                return stored;
            }
        }
    }
    return nullptr;
}

const Weight * Scope::required(const char * leaf, const Shape & ne) const {
    return store_->declare(weight(leaf, ne), find(leaf), true);
}

const Weight * Scope::table(const char * leaf, int64_t width, int64_t rows) const {
    Weight out = weight(leaf, {width, rows, 1, 1});
    out.table = true;
    return store_->declare(out, find(leaf), true);
}

const Weight * Scope::optional(const char * leaf, const Shape & ne) const {
    return store_->declare(weight(leaf, ne), find(leaf), false);
}

const Weight * Scope::fused(const char * leaf, const Shape & ne, std::vector<WeightPart> parts) const {
    Weight out = weight(leaf, ne);
    out.diffusers.clear();
    for (WeightPart & part : parts) {
        part.diffusers = join(diffusers_, part.diffusers);
    }
    out.parts = std::move(parts);
    return store_->declare(out, store_->checkpoint().find(out.name), true);
}

const Weight * Scope::turned(const Shape & ne) const {
    Weight out{name_, join(diffusers_, "weight"), ne};
    out.component = component_;
    out.wide = wide_;
    const StoredTensor * stored = store_->checkpoint().find(name_);
    out.transposed = stored != nullptr;
    return store_->declare(out, stored ? stored : store_->checkpoint().find(out.diffusers), true);
}

// ---- WeightStore ---------------------------------------------------------------------------------------

Scope WeightStore::root(const std::string & name, const std::string & diffusers) {
    components_.push_back({name});
    return {this, components_.size() - 1, name, diffusers};
}

// Whether the tensor can be the weight, or a part of this shape of it.
bool WeightStore::takes(Weight & weight, const StoredTensor & stored, Shape ne) {
    if (weight.transposed) {
        std::swap(ne[0], ne[1]);
    }
    if (stored.dims > 4 || squeezed(stored.ne) != squeezed(ne)) {
        misshapen_.push_back(text("%s is %s here, %s in this architecture", stored.name.c_str(),
                                  shape_text(stored.ne).c_str(), shape_text(ne).c_str()));
        return false;
    }
    const bool ragged = stored.ne[0] % dtype_info(static_cast<int32_t>(stored.type))->block != 0;
    if (!is_weight_type(stored.type) || (ragged && !weight.parts.empty())) {
        misshapen_.push_back(text("%s is of type %s, which holds no weights", stored.name.c_str(),
                                  dtype_name(stored.type)));
        return false;
    }
    return true;
}

const Weight * WeightStore::declare(const Weight & declared, const StoredTensor * stored, bool required) {
    if (!stored && !required && declared.parts.empty()) {
        return nullptr;
    }
    weights_.push_back(declared);
    Weight & weight = weights_.back();
    if (stored) {
        weight.stored = takes(weight, *stored, weight.ne) ? stored : nullptr;
        return &weight;
    }
    const bool is_vector = weight.ne[1] == 1;
    for (const WeightPart & part : weight.parts) {
        const StoredTensor * piece = checkpoint_.find(part.diffusers);
        if (!piece) {
            break;
        }
        const Shape ne = is_vector ? Shape{part.rows, 1, 1, 1} : Shape{weight.ne[0], part.rows, 1, 1};
        if (!takes(weight, *piece, ne)) {
            return &weight;
        }
        if (part.swap_halves) {
            weight.pieces.push_back({piece, part.rows / 2, part.rows - part.rows / 2});
            weight.pieces.push_back({piece, 0, part.rows / 2});
        } else {
            weight.pieces.push_back({piece, 0, part.rows});
        }
    }
    int64_t rows = 0;
    for (const StoredRows & piece : weight.pieces) {
        rows += piece.rows;
    }
    if (weight.parts.empty() || rows != weight.ne[is_vector ? 0 : 1]) {
        missing_.push_back(weight.name);
    } else {
        weight.stored = weight.pieces.front().tensor;
    }
    return &weight;
}

void WeightStore::check() const {
    if (missing_.empty() && misshapen_.empty()) {
        return;
    }
    std::string message = checkpoint_.path() + ":";
    if (!missing_.empty()) {
        message += text(" %zu of %zu weights are missing, first %s", missing_.size(), weights_.size(),
                        missing_.front().c_str());
    }
    if (!misshapen_.empty()) {
        message += text("%s %zu of %zu weights do not fit, first %s", missing_.empty() ? "" : ";",
                        misshapen_.size(), weights_.size(), misshapen_.front().c_str());
    }
    fail(Status::bad_file, "%s; is this file complete, and of this family?", message.c_str());
}

void WeightStore::check_all_used(const std::vector<std::string> & paths) const {
    std::unordered_set<const StoredTensor *> used;
    for (const Weight & weight : weights_) {
        used.insert(weight.stored);
        for (const StoredRows & piece : weight.pieces) {
            used.insert(piece.tensor);
        }
    }
    std::vector<std::string> unknown;
    for (const StoredTensor & stored : checkpoint_.tensors()) {
        const bool below = std::any_of(paths.begin(), paths.end(), [&](const std::string & path) {
            return stored.name.compare(0, path.size() + 1, path + ".") == 0;
        });
        if (below && used.count(&stored) == 0) {
            unknown.push_back(stored.name);
        }
    }
    if (!unknown.empty()) {
        fail(Status::unsupported, "%s: %zu tensors belong to no layer of this architecture, first %s",
             checkpoint_.path().c_str(), unknown.size(), unknown.front().c_str());
    }
}

size_t WeightStore::resident_bytes() const {
    size_t bytes = 0;
    for (const Weight & weight : weights_) {
        bytes += ggml_nbytes(weight.tensor);
    }
    return bytes;
}

std::string WeightStore::fingerprint() const {
    std::vector<const Weight *> sorted;
    for (const Weight & weight : weights_) {
        sorted.push_back(&weight);
    }
    std::sort(sorted.begin(), sorted.end(), [](const Weight * a, const Weight * b) { return a->name < b->name; });
    Checksum             sum;
    std::vector<uint8_t> copy;
    for (const Weight * weight : sorted) {
        const int32_t type = weight->tensor->type;
        sum.add(weight->name.data(), weight->name.size());
        sum.add(&type, sizeof type);
        sum.add(weight->ne.data(), sizeof weight->ne);
        const size_t bytes = ggml_nbytes(weight->tensor);
        if (weight->tensor->data && ggml_backend_buffer_is_host(weight->tensor->buffer)) {
            sum.add(weight->tensor->data, bytes);
        } else {
            copy = current_bytes(*weight);
            sum.add(copy.data(), bytes);
        }
    }
    return sum.hex();
}

} // namespace sd
