#include "families/learned_words.h"

#include "core/error.h"
#include "core/words.h"

#include <algorithm>
#include <cmath>

namespace sd {
namespace {

constexpr int64_t most_vectors = 75; // of a chunk

// How many vectors a word has, after all that has to fit.
int64_t check_word(const LearnedText & text, const std::vector<int64_t> & widths) {
    const std::string name = printable(text.name);
    if (text.vectors.size() != widths.size()) {
        fail(Status::bad_argument, "embedding '%s': is for %zu text encoders, and this model has %zu; it was made for "
             "another family", name.c_str(), text.vectors.size(), widths.size());
    }
    const int64_t n = text.vectors.front().ne[1];
    if (n < 1 || n > most_vectors) {
        fail(Status::bad_argument, "embedding '%s': has %lld vectors; a chunk of a prompt has room for 1 to %lld",
             name.c_str(), static_cast<long long>(n), static_cast<long long>(most_vectors));
    }
    for (size_t i = 0; i < widths.size(); ++i) {
        const Tensor & vectors = text.vectors[i];
        if (vectors.ne[0] != widths[i] || vectors.ne[1] != n) {
            fail(Status::bad_argument,
                 "embedding '%s': its vectors have %lld numbers, and the model's text encoder takes %lld; it was made "
                 "for another family",
                 name.c_str(), static_cast<long long>(vectors.ne[0]), static_cast<long long>(widths[i]));
        }
        if (!std::all_of(vectors.data.begin(), vectors.data.end(), [](float x) { return std::isfinite(x); })) {
            fail(Status::bad_argument, "embedding '%s': holds what is no finite number; the file is damaged", name.c_str());
        }
    }
    return n;
}

} // namespace

LearnedWords::LearnedWords(const ClipBpe & bpe, const std::vector<LearnedText> & texts,
                           const std::vector<int64_t> & widths) {
    for (const int64_t width : widths) {
        tables_.emplace_back().ne = {width, 0, 1, 1};
    }
    for (const LearnedText & text : texts) {
        const int64_t n = check_word(text, widths);
        words_.push_back({bpe.encode(text.name), static_cast<int>(n)});
        if (words_.back().ids.empty()) {
            fail(Status::bad_argument, "embedding '%s': no prompt can name it, because it has no tokens; rename it",
                 printable(text.name).c_str());
        }
        for (size_t i = 0; i < widths.size(); ++i) {
            tables_[i].ne[1] += n;
            tables_[i].data.insert(tables_[i].data.end(), text.vectors[i].data.begin(), text.vectors[i].data.end());
        }
    }
}

LearnedInputs::LearnedInputs(const std::vector<TokenChunk> & chunks, const LearnedWords & words, size_t encoder) {
    const auto is_learned = [](int row) { return row >= 0; };
    if (std::none_of(chunks.begin(), chunks.end(), [&](const TokenChunk & chunk) {
            return std::any_of(chunk.learned.begin(), chunk.learned.end(), is_learned);
        })) {
        return;
    }
    const Tensor & table = words.table(encoder);
    const int64_t  width = table.ne[0], n = static_cast<int64_t>(chunks.front().learned.size());
    keep_ = Tensor({1, n, static_cast<int64_t>(chunks.size()), 1});
    learned_ = Tensor({width, n, static_cast<int64_t>(chunks.size()), 1});
    int64_t token = 0;
    for (const TokenChunk & chunk : chunks) {
        for (const int row : chunk.learned) {
            keep_.data[token] = row < 0 ? 1.0f : 0.0f;
            if (row >= 0) {
                std::copy_n(table.data.begin() + row * width, width, learned_.data.begin() + token * width);
            }
            ++token;
        }
    }
}

void LearnedInputs::add_to(Inputs & inputs, const std::string & suffix) const {
    if (!keep_.data.empty()) {
        inputs["keep" + suffix] = &keep_;
        inputs["learned" + suffix] = &learned_;
    }
}

} // namespace sd
