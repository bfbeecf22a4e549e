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
void emphasise(float * states, int64_t width, const TokenChunk & chunk, int64_t first, int64_t n) {
    if (std::all_of(chunk.weights.begin(), chunk.weights.end(), [](float w) { return w == 1.0f; })) {
        return;
    }
    double     before = 0, after = 0;
    const auto for_each = [&](const auto & change) {
        float * token = states + first;
        for (const float weight : chunk.weights) {
            std::for_each(token, token + n, [&](float & value) { change(value, weight); });
            token += width;
        }
    };
    for_each([&](float & value, float weight) {
        before += value;
        value *= weight;
        after += value;
    });
    const float back = after == 0 ? 1.0f : static_cast<float>(before / after);
    for_each([&](float & value, float) { value *= back; });
}

void ClipPrompt::emphasise(Tensor & states, int64_t first, int64_t n) const {
    const int64_t width = states.ne[0];
    float *       at = states.data.data();
    for (const TokenChunk & chunk : chunks) {
        sd::emphasise(at, width, chunk, first, n);
        at += width * static_cast<int64_t>(chunk.weights.size());
    }
}

void check_clip_tokens(const Checkpoint & file, int64_t vocabulary, int64_t positions) {
    if (vocabulary <= ClipBpe::end_token || positions < 77) {
        fail(Status::unsupported, "%s: a text encoder of %lld tokens and %lld positions is not CLIP's (49408 and 77)",
             file.path().c_str(), static_cast<long long>(vocabulary), static_cast<long long>(positions));
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
