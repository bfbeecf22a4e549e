// T5 as families use it: its tokenizer, with the vocabulary from wherever that is to be had, and its encoder.
#pragma once

#include "families/family.h"
#include "models/t5.h"
#include "text/t5_unigram.h"

#include <string>

namespace sd {

// The vocabulary is that of the T5 in use: in the metadata of its GGUF file, or as spiece.model or tokenizer.json in its
// folder, of a text_encoder_3 in tokenizer_3; else the one in `data_dir`. Throws Error where the first that there is
// can't be used.
T5Unigram open_t5_tokenizer(const Checkpoint & checkpoint, const Scope & t5, const std::string & data_dir);

class T5Text {
  public:
    // `t5` as T5Encoder takes it.
    T5Text(const Checkpoint & checkpoint, const Scope & t5, const std::string & data_dir);

    // `length` tokens: the prompt's, cut where they are more, the end token, and padding.
    TokenChunk tokens(const Prompt & prompt, int64_t length) const;
    // What of the prompt tokens() cuts off, as a sentence; "" where it has room for all.
    std::string unread(const Prompt & prompt, int64_t length) const;
    // Those of the text alone.
    int64_t count_tokens(const std::string & text) const { return static_cast<int64_t>(unigram_.encode(text).size()); }

    // Input "t5_ids" [n, N] -> [width, n, N].
    Value operator()(Graph & g) const { return encoder_(g, g.input_ids("t5_ids")); }
    // The same for one chunk: [width, n, 1].
    Tensor encode(Runner & runner, const TokenChunk & chunk) const;

    int64_t width() const { return encoder_.c.width; }

  private:
    TokenChunk all_tokens(const Prompt & prompt) const;

    T5Encoder encoder_;
    T5Unigram unigram_;
};

} // namespace sd
