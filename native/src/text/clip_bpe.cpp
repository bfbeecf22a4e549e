// The order of the steps is that of transformers' CLIPTokenizer 5 (CLIPTokenizerFast before it):
// https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/clip/tokenization_clip.py
#include "text/clip_bpe.h"

#include "core/error.h"
#include "core/utf8.h"
#include "text/unicode.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <queue>

namespace sd {
namespace {

constexpr int32_t n_bytes = 256;
constexpr int32_t n_merges = 48894;
constexpr int32_t no_token = -1;
constexpr size_t longest = 128;        // bytes of a token; the longest in the file has 38
constexpr size_t most_bytes = 1 << 30; // of a text, so that places fit into 32 bits

constexpr std::u32string_view begin_text = U"<|startoftext|>";
constexpr std::string_view end_text = "<|endoftext|>";

static_assert(ClipBpe::begin_token == 2 * n_bytes + n_merges);

uint64_t pair_key(int32_t left, int32_t right) {
    return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
}

// Bytes that print in Latin-1 stand for themselves in the merges and come first in the vocabulary; the others
// are written as the characters from U+0100 on.
bool stands_for_itself(int byte) {
    return (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
}

// A word's part while pairs are joined: a doubly linked list in an array.
struct Part {
    int32_t id;
    int32_t before, after; // places of the neighbours, -1 at the ends
};

// Joining the part at `place` with the one after it; the least is done first.
struct Join {
    int32_t token, place;

    bool operator<(const Join & other) const { // the queue's top is its greatest
        return token != other.token ? token > other.token : place > other.place;
    }
};

bool is_symbol(char32_t c) {
    return !unicode::is_space(c) && !unicode::is_letter(c) && !unicode::is_number(c);
}

bool starts_with(std::u32string_view text, std::string_view what) {
    if (text.size() < what.size()) {
        return false;
    }
    for (size_t i = 0; i < what.size(); i++) {
        if (text[i] != static_cast<char32_t>(what[i])) {
            return false;
        }
    }
    return true;
}

// Calls `word` with each piece that is encoded by itself: a contraction, a run of letters, one digit, or a
// run of anything else that is no space.
template <class Word>
void for_each_word(std::u32string_view text, Word && word) {
    const auto run = [&](size_t begin, bool (*belongs)(char32_t)) {
        size_t end = begin;
        while (end < text.size() && belongs(text[end])) {
            end++;
        }
        return end - begin;
    };
    for (size_t i = 0; i < text.size();) {
        const std::u32string_view rest = text.substr(i);
        size_t n = 1;
        if (rest[0] == '\'') {
            for (const char * ending : {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"}) {
                if (starts_with(rest, ending)) {
                    n = std::strlen(ending);
                    break;
                }
            }
        }
        // Written in capitals it is no token, yet parts the symbols about it.
        if (starts_with(rest, end_text)) {
            word(rest.substr(0, 2));
            word(rest.substr(2, end_text.size() - 4));
            n = 2;
            i += end_text.size() - n;
        }
        if (n == 1 && !unicode::is_space(rest[0])) {
            n = unicode::is_letter(rest[0])   ? run(i, unicode::is_letter)
                : unicode::is_number(rest[0]) ? 1
                                              : run(i, is_symbol);
        }
        if (!unicode::is_space(text[i])) {
            word(text.substr(i, n));
        }
        i += n;
    }
}

} // namespace

ClipBpe::ClipBpe(const std::string & merges_path) {
    std::unordered_map<std::string, int32_t> ids; // tokens as the file spells them
    int32_t next_id = 0;
    char32_t other = 0x100;
    char32_t spelling[n_bytes];
    for (const bool first : {true, false}) {
        for (int byte = 0; byte < n_bytes; byte++) {
            if (stands_for_itself(byte) == first) {
                spelling[byte] = first ? static_cast<char32_t>(byte) : other++;
                byte_ids_[byte] = next_id++;
            }
        }
    }
    for (int byte = 0; byte < n_bytes; byte++) {
        std::string token;
        append_utf8(token, spelling[byte]);
        ids[token] = byte_ids_[byte];
        ids[token + "</w>"] = byte_ids_[byte] + n_bytes;
    }
    next_id += n_bytes;

    std::ifstream file(merges_path, std::ios::binary);
    if (!file) {
        fail(Status::io, "%s: %s; it holds the vocabulary of CLIP", merges_path.c_str(),
             std::strerror(errno));
    }
    joined_.reserve(n_merges);
    std::string line;
    int32_t n_lines = 0;
    while (std::getline(file, line)) {
        n_lines++;
        if (!line.empty() && line.back() == '\r') {
            line.pop_back();
        }
        if (line.empty() || (n_lines == 1 && line.find("#version") != std::string::npos)) {
            continue;
        }
        const size_t space = line.find(' ');
        const auto left = space < longest ? ids.find(line.substr(0, space)) : ids.end();
        const auto right =
            space < longest && line.size() < 2 * longest ? ids.find(line.substr(space + 1)) : ids.end();
        if (left == ids.end() || right == ids.end()) {
            fail(Status::bad_file, "%s: line %d does not join two tokens of the lines before it",
                 merges_path.c_str(), n_lines);
        }
        if (!joined_.emplace(pair_key(left->second, right->second), next_id).second ||
            !ids.emplace(left->first + right->first, next_id).second) {
            fail(Status::bad_file, "%s: line %d repeats an earlier one", merges_path.c_str(), n_lines);
        }
        next_id++;
    }
    if (file.bad()) {
        fail(Status::io, "%s: reading stopped after %d lines", merges_path.c_str(), n_lines);
    }
    if (next_id != begin_token) {
        fail(Status::bad_file, "%s: has %d merges where CLIP has %d", merges_path.c_str(),
             next_id - 2 * n_bytes, n_merges);
    }
}

std::vector<int32_t> ClipBpe::encode(std::string_view utf8) const {
    if (utf8.size() > most_bytes) {
        fail(Status::bad_argument, "the text has %zu bytes; the most is %zu", utf8.size(), most_bytes);
    }
    std::vector<int32_t> ids;
    for (;;) {
        const size_t end = utf8.find(end_text);
        append_text(utf8.substr(0, end), ids);
        if (end == std::string_view::npos) {
            return ids;
        }
        ids.push_back(end_token);
        utf8.remove_prefix(end + end_text.size());
    }
}

void ClipBpe::append_text(std::string_view utf8, std::vector<int32_t> & ids) const {
    const std::u32string text = unicode::lower(unicode::normal_form_c(unicode::decode(utf8)));
    // Models' folders declare the begin token "normalized": it counts in capitals too, and the end token
    // doesn't.
    for (size_t from = 0;;) {
        const size_t begin = text.find(begin_text, from);
        for_each_word(std::u32string_view(text).substr(from, begin - from),
                      [&](std::u32string_view word) { append_word(word, ids); });
        if (begin == std::u32string::npos) {
            return;
        }
        ids.push_back(begin_token);
        from = begin + begin_text.size();
    }
}

void ClipBpe::append_word(std::u32string_view word, std::vector<int32_t> & ids) const {
    std::string bytes;
    for (const char32_t c : word) {
        append_utf8(bytes, c);
    }
    const auto n = static_cast<int32_t>(bytes.size());
    std::vector<Part> parts(bytes.size());
    for (int32_t i = 0; i < n; i++) {
        parts[i] = {byte_ids_[static_cast<uint8_t>(bytes[i])], i - 1, i + 1 < n ? i + 1 : -1};
    }
    parts.back().id += n_bytes; // the end of a word is part of its last token

    const auto joined = [&](int32_t place) {
        const int32_t after = parts[place].after;
        const auto found = after < 0 || parts[place].id == no_token
                               ? joined_.end()
                               : joined_.find(pair_key(parts[place].id, parts[after].id));
        return found == joined_.end() ? no_token : found->second;
    };
    std::priority_queue<Join> queue;
    const auto consider = [&](int32_t place) {
        const int32_t token = place < 0 ? no_token : joined(place);
        if (token != no_token) {
            queue.push({token, place});
        }
    };
    for (int32_t i = 0; i < n; i++) {
        consider(i);
    }
    while (!queue.empty()) {
        const Join join = queue.top();
        queue.pop();
        if (joined(join.place) != join.token) {
            continue; // one of the two has been joined to another meanwhile
        }
        Part & left = parts[join.place];
        const int32_t right = left.after;
        left.id = join.token;
        left.after = parts[right].after;
        parts[right].id = no_token;
        if (left.after >= 0) {
            parts[left.after].before = join.place;
        }
        consider(join.place);
        consider(left.before);
    }
    for (int32_t i = 0; i >= 0; i = parts[i].after) {
        ids.push_back(parts[i].id);
    }
}

} // namespace sd
