// Textual inversions: words that stand for vectors of their own, in each of a family's text encoders.
#pragma once

#include "families/family.h"
#include "text/clip_chunks.h"

namespace sd {

class LearnedWords {
  public:
    // `widths` of the text encoders. Throws Error(bad_argument) where a word's vectors do not fit them, or its name has
    // no tokens.
    LearnedWords(const ClipBpe & bpe, const std::vector<LearnedText> & texts, const std::vector<int64_t> & widths);
    LearnedWords() = default;

    const std::vector<LearnedWord> & words() const { return words_; }

    // The vectors of all words, one after another, of one of the text encoders: [width, vectors].
    const Tensor & table(size_t encoder) const { return tables_[encoder]; }

  private:
    std::vector<LearnedWord> words_;
    std::vector<Tensor>      tables_;
};

// What a text encoder gets in place of tokens: its inputs "keep" and "learned", see models/clip.h.
class LearnedInputs {
  public:
    LearnedInputs(const std::vector<TokenChunk> & chunks, const LearnedWords & words, size_t encoder);

    // Nothing where the chunks name no word, so that the graph stays as it is.
    void add_to(Inputs & inputs, const std::string & suffix = "") const;

  private:
    Tensor keep_, learned_;
};

} // namespace sd
