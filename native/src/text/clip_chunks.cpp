#include "text/clip_chunks.h"

#include <algorithm>

namespace sd {
namespace {

constexpr size_t room = 75;            // tokens of a chunk between begin and end
constexpr size_t comma_backtrack = 20; // a chunk that ends up to so many tokens behind a comma is cut there
constexpr int32_t comma_token = 267;   // ",</w>"

struct Token {
    int32_t id;
    float   weight;
    int     learned = -1;
};

TokenChunk close(const std::vector<Token> & tokens, int32_t pad) {
    TokenChunk chunk;
    chunk.ids.push_back(ClipBpe::begin_token);
    chunk.weights.push_back(1.0f);
    chunk.learned.push_back(-1);
    for (const Token & token : tokens) {
        chunk.ids.push_back(token.id);
        chunk.weights.push_back(token.weight);
        chunk.learned.push_back(token.learned);
    }
    chunk.ids.push_back(ClipBpe::end_token);
    chunk.ids.resize(room + 2, pad);
    chunk.weights.resize(room + 2, 1.0f);
    chunk.learned.resize(room + 2, -1);
    return chunk;
}

// The word whose name stands at a place; the longest where there are several, none where there is none.
size_t word_at(const std::vector<int32_t> & ids, size_t at, const std::vector<LearnedWord> & words) {
    size_t found = words.size();
    for (size_t i = 0; i < words.size(); ++i) {
        const std::vector<int32_t> & name = words[i].ids;
        const bool here = !name.empty() && name.size() <= ids.size() - at &&
                          std::equal(name.begin(), name.end(), ids.begin() + static_cast<std::ptrdiff_t>(at));
        if (here && (found == words.size() || name.size() > words[found].ids.size())) {
            found = i;
        }
    }
    return found;
}

// What stands together: one token, or the vectors of a word.
std::vector<std::vector<Token>> pieces(const ClipBpe & bpe, const std::string & text, float weight,
                                       const std::vector<LearnedWord> & words) {
    const std::vector<int32_t>      ids = bpe.encode(text);
    std::vector<std::vector<Token>> out;
    for (size_t at = 0; at < ids.size();) {
        const size_t word = word_at(ids, at, words);
        if (word == words.size()) {
            out.push_back({{ids[at++], weight}});
            continue;
        }
        int first = 0;
        for (size_t i = 0; i < word; ++i) {
            first += words[i].vectors;
        }
        std::vector<Token> vectors;
        for (int i = 0; i < words[word].vectors; ++i) {
            vectors.push_back({0, weight, first + i});
        }
        out.push_back(std::move(vectors));
        at += words[word].ids.size();
    }
    return out;
}

} // namespace

std::vector<TokenChunk> chunk_tokens(const ClipBpe & bpe, const std::vector<Span> & spans, int32_t pad,
                                     const std::vector<LearnedWord> & words) {
    std::vector<TokenChunk> chunks;
    std::vector<Token> open;
    size_t behind_comma = 0; // tokens up to and with the last comma; 0: none

    for (const Span & span : spans) {
        if (span.is_break) {
            chunks.push_back(close(open, pad));
            open.clear();
            behind_comma = 0;
            continue;
        }
        for (const std::vector<Token> & piece : pieces(bpe, span.text, span.weight, words)) {
            const bool is_comma = piece.front().learned < 0 && piece.front().id == comma_token;
            if (open.size() == room) {
                const bool at_comma = !is_comma && behind_comma > 0 && room - behind_comma < comma_backtrack;
                const size_t keep = at_comma ? behind_comma : room;
                std::vector<Token> moved(open.begin() + static_cast<std::ptrdiff_t>(keep), open.end());
                open.resize(keep);
                chunks.push_back(close(open, pad));
                open = std::move(moved);
                behind_comma = 0;
            }
            if (open.size() + piece.size() > room) { // a word's vectors are not torn apart
                chunks.push_back(close(open, pad));
                open.clear();
                behind_comma = 0;
            }
            open.insert(open.end(), piece.begin(), piece.end());
            if (is_comma) {
                behind_comma = open.size();
            }
        }
    }
    if (!open.empty() || chunks.empty()) {
        chunks.push_back(close(open, pad));
    }
    return chunks;
}

int count_tokens(const ClipBpe & bpe, const std::string & text, const std::vector<LearnedWord> & words) {
    size_t n = 0;
    for (const std::vector<Token> & piece : pieces(bpe, text, 1.0f, words)) {
        n += piece.size();
    }
    return static_cast<int>(n);
}

} // namespace sd
