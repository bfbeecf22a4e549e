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

struct TokenChunk {
    std::vector<int32_t> ids;     // [77]: begin, 75 tokens, end or padding
    std::vector<float>   weights; // [77]
};

// At least one chunk. `pad` fills what is empty behind the end token.
std::vector<TokenChunk> chunk_tokens(const ClipBpe & bpe, const std::vector<Span> & spans, int32_t pad);

} // namespace sd
