#include "text/clip_chunks.h"

namespace sd {
namespace {

constexpr size_t room = 75;            // tokens of a chunk between begin and end
constexpr size_t comma_backtrack = 20; // a chunk that ends up to so many tokens behind a comma is cut there
constexpr int32_t comma_token = 267;   // ",</w>"

struct Token {
    int32_t id;
    float weight;
};

TokenChunk close(const std::vector<Token> & tokens, int32_t pad) {
    TokenChunk chunk;
    chunk.ids.push_back(ClipBpe::begin_token);
    chunk.weights.push_back(1.0f);
    for (const Token & token : tokens) {
        chunk.ids.push_back(token.id);
        chunk.weights.push_back(token.weight);
    }
    chunk.ids.push_back(ClipBpe::end_token);
    chunk.ids.resize(room + 2, pad);
    chunk.weights.resize(room + 2, 1.0f);
    return chunk;
}

} // namespace

std::vector<TokenChunk> chunk_tokens(const ClipBpe & bpe, const std::vector<Span> & spans, int32_t pad) {
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
        for (const int32_t id : bpe.encode(span.text)) {
            if (open.size() == room) {
                const bool at_comma =
                    id != comma_token && behind_comma > 0 && room - behind_comma < comma_backtrack;
                const size_t keep = at_comma ? behind_comma : room;
                std::vector<Token> moved(open.begin() + static_cast<std::ptrdiff_t>(keep), open.end());
                open.resize(keep);
                chunks.push_back(close(open, pad));
                open = std::move(moved);
                behind_comma = 0;
            }
            open.push_back({id, span.weight});
            if (id == comma_token) {
                behind_comma = open.size();
            }
        }
    }
    if (!open.empty() || chunks.empty()) {
        chunks.push_back(close(open, pad));
    }
    return chunks;
}

} // namespace sd
