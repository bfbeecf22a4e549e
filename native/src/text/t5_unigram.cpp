#include "text/t5_unigram.h"

#include "core/error.h"
#include "core/utf8.h"
#include "core/words.h"
#include "text/charsmap.h"
#include "text/unicode.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <optional>

namespace sd {
namespace {

constexpr std::string_view SPACE = "\u2581";
constexpr double           UNKNOWN_PENALTY = 10; // below the least likely piece

std::string to_utf8(std::u32string_view text) {
    std::string out;
    for (const char32_t character : text) {
        append_utf8(out, character);
    }
    return out;
}

std::u32string join_spaces(const std::u32string & text) {
    std::u32string out;
    for (size_t at = 0, end; at < text.size(); at = end) {
        end = std::max(std::min(text.find_first_not_of(U' ', at), text.size()), at + 1);
        out += end > at + 1 ? U'\u2581' : text[at];
    }
    return out;
}

bool begins_with(std::string_view text, std::string_view begin) { return text.substr(0, begin.size()) == begin; }

} // namespace

struct T5Unigram::Tables {
    explicit Tables(UnigramVocabulary given);

    const AddedToken * added_at(std::u32string_view text) const;
    void               append_text(std::u32string_view text, bool first, std::vector<int32_t> & ids) const;
    void               append_word(std::string_view word, bool prefixed, std::vector<int32_t> & ids) const;
    void               append_pieces(std::string_view word, std::vector<int32_t> & ids) const;
    template <typename Found> void for_each_prefix(std::string_view text, Found && found) const;

    UnigramVocabulary           vocabulary;
    std::optional<Charsmap>     charsmap;
    std::vector<int32_t>        sorted; // ids by text, the later of two alike first
    double                      unknown_score;
    std::vector<std::u32string> added; // the texts of vocabulary.added
};

T5Unigram::Tables::Tables(UnigramVocabulary given) : vocabulary(std::move(given)) {
    const std::vector<UnigramPiece> & pieces = vocabulary.pieces;
    const char *                      where = vocabulary.where.c_str();
    double                            least = 0;
    for (size_t id = 0; id < pieces.size(); ++id) {
        const UnigramPiece & piece = pieces[id];
        if (!std::isfinite(piece.score)) {
            fail(Status::bad_file, "%s: the piece '%s' has the score %g; the file is damaged", where,
                 printable(piece.text).c_str(), piece.score);
        }
        if (!piece.text.empty() && piece.kind != UnigramPiece::Kind::unused && piece.kind != UnigramPiece::Kind::byte) {
            sorted.push_back(static_cast<int32_t>(id));
            least = std::min(least, piece.score);
        }
    }
    if (sorted.empty()) {
        fail(Status::bad_file, "%s: has no pieces; is it a tokenizer?", where);
    }
    unknown_score = least - UNKNOWN_PENALTY;
    std::sort(sorted.begin(), sorted.end(), [&](int32_t a, int32_t b) {
        const int order = pieces[a].text.compare(pieces[b].text);
        return order != 0 ? order < 0 : a > b;
    });
    for (const AddedToken & token : vocabulary.added) {
        if (token.text.empty()) {
            fail(Status::bad_file, "%s: the added token %d is empty; the file is damaged", where, token.id);
        }
        added.push_back(unicode::decode(token.text));
    }
    if (!vocabulary.charsmap.empty()) {
        charsmap.emplace(vocabulary.charsmap, vocabulary.where);
    }
}

// The longest added token that `text` begins with, or null.
const AddedToken * T5Unigram::Tables::added_at(std::u32string_view text) const {
    size_t             longest = 0;
    const AddedToken * found = nullptr;
    for (size_t i = 0; i < added.size(); ++i) {
        if (added[i].size() > longest && text.substr(0, added[i].size()) == added[i]) {
            longest = added[i].size();
            found = &vocabulary.added[i];
        }
    }
    return found;
}

// Calls found(id, bytes) for each piece that `text` begins with, the shortest first.
template <typename Found> void T5Unigram::Tables::for_each_prefix(std::string_view text, Found && found) const {
    auto first = sorted.begin(), last = sorted.end();
    for (size_t n = 0; n < text.size(); ++n) { // narrows to the pieces with the first n + 1 bytes of text
        const auto byte_of = [&](int32_t id) { return static_cast<uint8_t>(vocabulary.pieces[id].text[n]); };
        const auto byte = static_cast<uint8_t>(text[n]);
        first = std::partition_point(first, last, [&](int32_t id) { return byte_of(id) < byte; });
        last = std::partition_point(first, last, [&](int32_t id) { return byte_of(id) == byte; });
        if (first == last) {
            return;
        }
        if (vocabulary.pieces[*first].text.size() == n + 1) {
            found(*first, n + 1);
            const auto longer = [&](int32_t id) { return vocabulary.pieces[id].text.size() == n + 1; };
            first = std::partition_point(first, last, longer);
        }
    }
}

// The cut into pieces whose scores have the largest sum (Viterbi, 1967). A character that no piece begins and ends at
// counts as an unknown piece; unknown neighbours become one.
void T5Unigram::Tables::append_pieces(std::string_view word, std::vector<int32_t> & ids) const {
    struct Node {
        double  score = -std::numeric_limits<double>::infinity();
        size_t  begin = 0;
        int32_t id = 0;
    };
    std::vector<Node> best(word.size() + 1); // of the cuts that end here
    best[0].score = 0;
    const auto offer = [&](size_t begin, size_t bytes, double score, int32_t id) {
        Node & node = best[begin + bytes];
        if (score > node.score) {
            node = {score, begin, id};
        }
    };
    for (size_t at = 0, character; at < word.size(); at += character) {
        const double so_far = best[at].score;
        bool         covered = false;
        character = utf8_length(word.substr(at));
        for_each_prefix(word.substr(at), [&](int32_t id, size_t bytes) {
            offer(at, bytes, so_far + vocabulary.pieces[id].score, id);
            covered = covered || bytes == character;
        });
        if (!covered) {
            offer(at, character, so_far + unknown_score, vocabulary.unknown);
        }
    }
    std::vector<int32_t> backwards;
    for (size_t end = word.size(); end > 0; end = best[end].begin) {
        const bool again = !backwards.empty() && backwards.back() == vocabulary.unknown;
        if (best[end].id != vocabulary.unknown || !again) {
            backwards.push_back(best[end].id);
        }
    }
    ids.insert(ids.end(), backwards.rbegin(), backwards.rend());
}

// Spaces become U+2581, each of which begins a run of pieces.
void T5Unigram::Tables::append_word(std::string_view word, bool prefixed, std::vector<int32_t> & ids) const {
    if (word.empty()) {
        return;
    }
    std::string spaced;
    for (const char byte : word) {
        if (byte == ' ') {
            spaced += SPACE;
        } else {
            spaced += byte;
        }
    }
    if (prefixed && !begins_with(spaced, SPACE)) {
        spaced.insert(0, SPACE);
    }
    for (size_t at = 0, end; at < spaced.size(); at = end) {
        end = std::min(spaced.find(SPACE, at + 1), spaced.size());
        append_pieces(std::string_view(spaced).substr(at, end - at), ids);
    }
}

// Text without added tokens in it; `first` says that nothing stands before it.
void T5Unigram::Tables::append_text(std::u32string_view text, bool first, std::vector<int32_t> & ids) const {
    const UnigramVocabulary & v = vocabulary;
    std::u32string            rest(text);
    if (charsmap) {
        rest = unicode::decode(charsmap->normalise(rest));
    }
    while (v.strips_right && !rest.empty() && unicode::is_space(rest.back())) {
        rest.pop_back();
    }
    if (v.joins_spaces) {
        rest = join_spaces(rest);
    }
    const auto prefixed = [&](size_t at) {
        return v.prefix == UnigramVocabulary::Prefix::always ||
               (v.prefix == UnigramVocabulary::Prefix::first && first && at == 0);
    };
    if (!v.splits_spaces) {
        append_word(to_utf8(rest), prefixed(0), ids);
        return;
    }
    for (size_t at = 0, end; at < rest.size(); at = end + 1) {
        end = at;
        while (end < rest.size() && !unicode::is_space(rest[end])) {
            ++end;
        }
        append_word(to_utf8(std::u32string_view(rest).substr(at, end - at)), prefixed(at), ids);
    }
}

T5Unigram::T5Unigram(UnigramVocabulary vocabulary) : tables_(std::make_unique<const Tables>(std::move(vocabulary))) {}
T5Unigram::~T5Unigram() = default;
T5Unigram::T5Unigram(T5Unigram &&) noexcept = default;

const std::string & T5Unigram::where() const { return tables_->vocabulary.where; }

int32_t T5Unigram::size() const {
    auto size = static_cast<int32_t>(tables_->vocabulary.pieces.size());
    for (const AddedToken & token : tables_->vocabulary.added) {
        size = std::max(size, token.id + 1);
    }
    return size;
}

std::vector<int32_t> T5Unigram::encode(std::string_view utf8) const {
    const std::u32string      whole = unicode::decode(utf8);
    const std::u32string_view text(whole);
    std::vector<int32_t>      ids;
    size_t                    begin = 0; // of what is not encoded yet
    for (size_t at = 0; at < text.size();) {
        const AddedToken * token = tables_->added_at(text.substr(at));
        if (!token) {
            ++at;
            continue;
        }
        size_t left = at, right = at + unicode::decode(token->text).size();
        while (token->strips_left && left > begin && unicode::is_space(text[left - 1])) {
            --left;
        }
        while (token->strips_right && right < text.size() && unicode::is_space(text[right])) {
            ++right;
        }
        tables_->append_text(text.substr(begin, left - begin), begin == 0, ids);
        ids.push_back(token->id);
        begin = at = right;
    }
    tables_->append_text(text.substr(begin), begin == 0, ids);
    return ids;
}

std::string T5Unigram::decode(const std::vector<int32_t> & ids) const {
    const UnigramVocabulary & v = tables_->vocabulary;
    std::string               joined, out;
    for (const int32_t id : ids) {
        const auto token =
            std::find_if(v.added.begin(), v.added.end(), [&](const AddedToken & added) { return added.id == id; });
        joined += token != v.added.end() ? token->text : v.pieces[static_cast<size_t>(id)].text;
    }
    for (size_t at = 0; at < joined.size();) {
        const bool is_space = begins_with(std::string_view(joined).substr(at), SPACE);
        out += is_space ? ' ' : joined[at];
        at += is_space ? SPACE.size() : 1;
    }
    return out.substr(std::min(out.find_first_not_of(' '), out.size()));
}

} // namespace sd
