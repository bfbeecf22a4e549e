#include "text/unicode.h"

#include "text/unicode_data.h"

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <unordered_map>
#include <utility>

namespace sd::unicode {
namespace {

using namespace unicode_data;

constexpr uint32_t composes = uint32_t{1} << 31; // see Decomposition

// Hangul syllables are composed by rule:
// https://www.unicode.org/versions/Unicode16.0.0/core-spec/chapter-3/#G24646
constexpr char32_t hangul_syllables = 0xAC00, hangul_leads = 0x1100, hangul_vowels = 0x1161,
                   hangul_tails = 0x11A7;
constexpr char32_t n_leads = 19, n_vowels = 21, n_tails = 28, n_syllables = n_leads * n_vowels * n_tails;

// The row whose first..last holds the character, or null. Rows are sorted and apart.
template <class Row, size_t n>
const Row * find(const Row (&rows)[n], char32_t character) {
    const Row * row = std::upper_bound(std::begin(rows), std::end(rows), character,
                                       [](char32_t c, const Row & r) { return c < r.first; });
    return row != rows && character <= row[-1].last ? row - 1 : nullptr;
}

uint32_t combining_class(char32_t character) {
    const ClassRange * row = character < 0x300 ? nullptr : find(combining, character);
    return row ? row->combining_class : 0;
}

void append_decomposed(char32_t character, std::u32string & out) {
    if (character < 0xC0) {
        out += character;
        return;
    }
    if (character >= hangul_syllables && character < hangul_syllables + n_syllables) {
        const char32_t index = character - hangul_syllables;
        out += hangul_leads + index / (n_vowels * n_tails);
        out += hangul_vowels + index % (n_vowels * n_tails) / n_tails;
        if (index % n_tails) {
            out += hangul_tails + index % n_tails;
        }
        return;
    }
    const Decomposition * row =
        std::lower_bound(std::begin(decompositions), std::end(decompositions), character,
                         [](const Decomposition & d, char32_t c) { return (d.character & ~composes) < c; });
    if (row == std::end(decompositions) || (row->character & ~composes) != character) {
        out += character;
        return;
    }
    append_decomposed(row->first, out);
    if (row->second) {
        append_decomposed(row->second, out);
    }
}

// 0 where the two don't compose.
char32_t compose(char32_t first, char32_t second) {
    if (first >= hangul_leads && first < hangul_leads + n_leads && second >= hangul_vowels &&
        second < hangul_vowels + n_vowels) {
        return hangul_syllables + ((first - hangul_leads) * n_vowels + (second - hangul_vowels)) * n_tails;
    }
    if (first >= hangul_syllables && first < hangul_syllables + n_syllables &&
        (first - hangul_syllables) % n_tails == 0 && second > hangul_tails &&
        second < hangul_tails + n_tails) {
        return first + (second - hangul_tails);
    }
    static const auto pairs = [] {
        std::unordered_map<uint64_t, char32_t> out;
        for (const Decomposition & row : decompositions) {
            if (row.character & composes) {
                out.emplace(uint64_t{row.first} << 32 | row.second, row.character & ~composes);
            }
        }
        return out;
    }();
    const auto found = pairs.find(uint64_t{first} << 32 | second);
    return found == pairs.end() ? 0 : found->second;
}

} // namespace

std::u32string decode(std::string_view utf8) {
    std::u32string out;
    out.reserve(utf8.size());
    for (size_t i = 0; i < utf8.size();) {
        const auto lead = static_cast<uint8_t>(utf8[i++]);
        // How many bytes follow, and what the first of them may be (Unicode, table 3-7).
        int more = 0;
        if (lead >= 0xC2 && lead <= 0xF4) {
            more = lead >= 0xF0 ? 3 : lead >= 0xE0 ? 2 : 1;
        }
        uint8_t low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
        uint8_t high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
        char32_t character = more ? lead & (0x3F >> more) : lead;
        bool whole = more > 0 || lead < 0x80;
        for (; whole && more > 0; more--, low = 0x80, high = 0xBF) {
            const auto byte = static_cast<uint8_t>(i < utf8.size() ? utf8[i] : 0);
            whole = byte >= low && byte <= high;
            if (whole) {
                character = character << 6 | (byte & 0x3F);
                i++;
            }
        }
        out += whole ? character : U'\uFFFD';
    }
    return out;
}

bool is_space(char32_t c) {
    return (c >= 0x9 && c <= 0xD) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F ||
           c == 0x3000;
}

bool is_letter(char32_t c) {
    return c < 0x80 ? (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') : find(letters, c) != nullptr;
}

bool joins_previous(char32_t character) { return find(unicode_data::joins_previous, character) != nullptr; }
bool joins_next(char32_t character) { return find(unicode_data::joins_next, character) != nullptr; }
bool stands_alone(char32_t character) { return find(unicode_data::stands_alone, character) != nullptr; }

bool is_number(char32_t c) { return c < 0x80 ? c >= '0' && c <= '9' : find(numbers, c) != nullptr; }

std::u32string normal_form_c(std::u32string text) {
    if (std::all_of(text.begin(), text.end(), [](char32_t c) { return c < 0x300; })) {
        return text; // composed already
    }
    std::u32string parts;
    parts.reserve(text.size());
    for (const char32_t c : text) {
        append_decomposed(c, parts);
    }
    for (auto begin = parts.begin(); begin != parts.end();) { // marks into canonical order
        if (combining_class(*begin) == 0) {
            ++begin;
            continue;
        }
        const auto end = std::find_if(begin, parts.end(), [](char32_t c) { return combining_class(c) == 0; });
        std::stable_sort(begin, end,
                         [](char32_t a, char32_t b) { return combining_class(a) < combining_class(b); });
        begin = end;
    }
    std::u32string out;
    out.reserve(parts.size());
    size_t starter = std::u32string::npos; // in `out`
    uint32_t before = 0;                   // class of the last character kept after the starter
    for (const char32_t c : parts) {
        const uint32_t cc = combining_class(c);
        if (starter != std::u32string::npos && (out.size() == starter + 1 || (before != 0 && before < cc))) {
            if (const char32_t composed = compose(out[starter], c)) {
                out[starter] = composed;
                continue;
            }
        }
        if (cc == 0) {
            starter = out.size();
        }
        before = cc;
        out += c;
    }
    return out;
}

std::u32string lower(std::u32string_view text) {
    std::u32string out;
    out.reserve(text.size());
    for (const char32_t c : text) {
        if (c == 0x130) { // the only one that becomes two: i and a dot
            out += {0x69, 0x307};
            continue;
        }
        const LowerRun * run = find(unicode_data::lower, c);
        out += run && (c - run->first) % run->step == 0 ? c + static_cast<char32_t>(run->distance) : c;
    }
    return out;
}

} // namespace sd::unicode
