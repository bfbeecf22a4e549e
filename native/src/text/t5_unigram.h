// SentencePiece's unigram model (Kudo, 2018, "Subword Regularization") as T5 uses it: text to token ids.
#pragma once

#include "text/unigram_vocabulary.h"

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace sd {

class T5Unigram {
  public:
    static constexpr int32_t pad_token = 0, end_token = 1; // in every T5

    explicit T5Unigram(UnigramVocabulary vocabulary);
    ~T5Unigram();
    T5Unigram(T5Unigram &&) noexcept;

    // Ids as transformers' T5TokenizerFast gives them with add_special_tokens=False: `end_token` is the caller's
    // to append. `utf8` may hold anything: bytes that are no UTF-8 are replaced as Python's errors="replace" does.
    std::vector<int32_t> encode(std::string_view utf8) const;

    // The text that these ids stand for, as SentencePiece joins pieces; ids from encode() only.
    std::string decode(const std::vector<int32_t> & ids) const;

    int32_t             size() const; // ids are below it
    const std::string & where() const; // the vocabulary's file

  private:
    struct Tables;
    std::unique_ptr<const Tables> tables_;
};

} // namespace sd
