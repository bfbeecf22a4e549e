// A prompt as CLIP's encoders read it: windows of 77 tokens, and weights for what comes out of them.
#pragma once

#include "core/tensor.h"
#include "text/clip_chunks.h"

#include <vector>

namespace sd {

struct ClipPrompt {
    // Filled up with empty text to `chunks`. `pad` stands behind the end token.
    ClipPrompt(const ClipBpe & bpe, const std::vector<Span> & prompt, int32_t pad, int chunks,
               const std::vector<LearnedWord> & words = {});

    Tensor ids() const;  // [77, chunks]
    Tensor ends() const; // [chunks]: each chunk's end token, counted through all of them

    // Multiplies the features first..first+n of each token's state by the token's weight, and each chunk back to
    // the mean that they had: states [width, 77, chunks].
    void emphasise(Tensor & states, int64_t first, int64_t n) const;

    std::vector<TokenChunk> chunks;
};

// How many chunks a prompt fills.
int count_clip_chunks(const ClipBpe & bpe, const std::vector<Span> & prompt,
                      const std::vector<LearnedWord> & words = {});

// Chunks side by side: [width, 77, chunks] -> [width, 77 * chunks].
Tensor join_chunks(Tensor states);

// Throws Error(bad_argument) where clip_skip is not in this range.
void check_clip_skip(int clip_skip, int64_t first, int64_t last);

} // namespace sd
