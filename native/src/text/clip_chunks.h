// Weighted text to CLIP's windows of 77 tokens, cut as stable-diffusion-webui cuts long prompts.
#pragma once

#include "text/clip_bpe.h"

#include <string>
#include <vector>

namespace sd {

// A run of text and how strongly to follow it.
struct Span {
    std::string text;
    float       weight = 1.0f;
    bool        is_break = false; // no text: what follows begins a new chunk
};

// A word that stands for vectors of its own instead of tokens: a textual inversion (Gal et al., 2022).
struct LearnedWord {
    std::vector<int32_t> ids; // of its name
    int                  vectors; // at most 75
};

struct TokenChunk {
    std::vector<int32_t> ids;     // [77]: begin, 75 tokens, end or padding
    std::vector<float>   weights; // [77]
    std::vector<int>     learned; // [77]: a vector, counted through all words, or -1; the id is without meaning then
};

// At least one chunk. `pad` fills what is empty behind the end token. Of words that begin with the same tokens the
// longest counts; a word's vectors stay in one chunk.
std::vector<TokenChunk> chunk_tokens(const ClipBpe & bpe, const std::vector<Span> & spans, int32_t pad,
                                     const std::vector<LearnedWord> & words = {});

// Tokens and learned vectors of a text, without begin and end.
int count_tokens(const ClipBpe & bpe, const std::string & text, const std::vector<LearnedWord> & words);

} // namespace sd
