#include "families/clip_prompt.h"

#include "core/error.h"

#include <algorithm>

namespace sd {

ClipPrompt::ClipPrompt(const ClipBpe & bpe, const std::vector<Span> & prompt, int32_t pad, int n,
                       const std::vector<LearnedWord> & words)
    : chunks(chunk_tokens(bpe, prompt, pad, words)) {
    while (static_cast<int>(chunks.size()) < n) {
        chunks.push_back(chunk_tokens(bpe, {}, pad).front());
    }
}

Tensor ClipPrompt::ids() const {
    const int64_t n = static_cast<int64_t>(chunks.front().ids.size());
    Tensor        out({n, static_cast<int64_t>(chunks.size()), 1, 1});
    auto          at = out.data.begin();
    for (const TokenChunk & chunk : chunks) {
        at = std::copy(chunk.ids.begin(), chunk.ids.end(), at);
    }
    return out;
}

Tensor ClipPrompt::ends() const {
    Tensor out({static_cast<int64_t>(chunks.size()), 1, 1, 1});
    for (size_t i = 0; i < chunks.size(); ++i) {
        const std::vector<int32_t> & ids = chunks[i].ids;
        const auto                   end = std::find(ids.begin(), ids.end(), ClipBpe::end_token);
        out.data[i] = static_cast<float>(i * ids.size() + static_cast<size_t>(end - ids.begin()));
    }
    return out;
}

// The mean is kept as in stable-diffusion-webui, so that emphasis does not change the conditioning as a whole.
void ClipPrompt::emphasise(Tensor & states, int64_t first, int64_t n) const {
    const int64_t width = states.ne[0];
    float *       token = states.data.data() + first;
    for (const TokenChunk & chunk : chunks) {
        float * const begin = token;
        double        before = 0, after = 0;
        for (const float weight : chunk.weights) {
            for (int64_t i = 0; i < n; ++i) {
                before += token[i];
                token[i] *= weight;
                after += token[i];
            }
            token += width;
        }
        const bool plain = std::all_of(chunk.weights.begin(), chunk.weights.end(), [](float w) { return w == 1.0f; });
        if (plain || after == 0) {
            continue;
        }
        const float back = static_cast<float>(before / after);
        for (float * at = begin; at < token; at += width) {
            std::transform(at, at + n, at, [&](float value) { return value * back; });
        }
    }
}

int count_clip_chunks(const ClipBpe & bpe, const std::vector<Span> & prompt,
                      const std::vector<LearnedWord> & words) {
    return static_cast<int>(chunk_tokens(bpe, prompt, ClipBpe::end_token, words).size());
}

Tensor join_chunks(Tensor states) {
    states.ne = {states.ne[0], states.ne[1] * states.ne[2], 1, 1};
    return states;
}

void check_clip_skip(int clip_skip, int64_t first, int64_t last) {
    if (clip_skip < first || clip_skip > last) {
        fail(Status::bad_argument, "clip_skip %d: must be between %lld and %lld, by the layers of the text encoder",
             clip_skip, static_cast<long long>(first), static_cast<long long>(last));
    }
}

} // namespace sd
