#include "text/charsmap.h"

#include "core/error.h"
#include "core/utf8.h"
#include "text/unicode.h"

namespace sd {
namespace {

constexpr size_t longest_cluster = 5;       // bytes
constexpr size_t longest_replacement = 256; // bytes; NFKC's longest has 33

uint32_t offset_of(uint32_t unit) { return (unit >> 10) << ((unit & 0x200u) >> 6); }

uint32_t u32_at(std::string_view bytes, size_t at) {
    uint32_t out = 0;
    for (size_t i = 0; i < 4; ++i) {
        out |= static_cast<uint32_t>(static_cast<uint8_t>(bytes[at + i])) << (8 * i);
    }
    return out;
}

// The end of the cluster that begins at `at`. Rules that concern clusters of more than five bytes alone (Hangul,
// emoji, flags, Indic conjuncts) are left out.
size_t cluster_end(const std::u32string & text, size_t at) {
    size_t end = at + 1;
    for (; end < text.size(); ++end) {
        const char32_t before = text[end - 1], next = text[end];
        const bool     line_end = before == U'\r' && next == U'\n';
        const bool     apart = unicode::stands_alone(before) || unicode::stands_alone(next);
        if (!line_end && (apart || (!unicode::joins_previous(next) && !unicode::joins_next(before)))) {
            break;
        }
    }
    return end;
}

} // namespace

Charsmap::Charsmap(std::string_view bytes, std::string where) : where_(std::move(where)) {
    const size_t size = bytes.size() < 4 ? 0 : u32_at(bytes, 0);
    if (size < 4 || size % 4 != 0 || size > bytes.size() - 4) {
        fail(Status::bad_file, "%s: its table of normalisation has %zu bytes, but states a trie of %zu; the file is damaged",
             where_.c_str(), bytes.size(), size);
    }
    for (size_t at = 0; at < size; at += 4) {
        units_.push_back(u32_at(bytes, 4 + at));
    }
    replacements_ = std::string(bytes.substr(4 + size));
}

// What the shortest prefix of `key` that the trie knows becomes.
std::optional<std::string_view> Charsmap::find(std::string_view key) const {
    size_t at = offset_of(units_[0]);
    for (const char letter : key) {
        const auto byte = static_cast<uint8_t>(letter);
        at ^= byte;
        if (byte == 0 || at >= units_.size() || (units_[at] & 0x800000ffu) != byte) {
            return std::nullopt;
        }
        const bool is_key = (units_[at] >> 8 & 1) != 0;
        at ^= offset_of(units_[at]);
        if (is_key) {
            const size_t begin = at < units_.size() ? units_[at] & 0x7fffffffu : replacements_.size();
            const size_t end = begin < replacements_.size() ? replacements_.find('\0', begin) : std::string::npos;
            if (end == std::string::npos || end - begin > longest_replacement) {
                fail(Status::bad_file, "%s: its table of normalisation points outside itself; the file is damaged", where_.c_str());
            }
            return std::string_view(replacements_).substr(begin, end - begin);
        }
    }
    return std::nullopt;
}

std::string Charsmap::normalise(const std::u32string & text) const {
    std::string out;
    for (size_t at = 0, end; at < text.size(); at = end) {
        end = cluster_end(text, at);
        std::string cluster;
        for (size_t i = at; i < end; ++i) {
            append_utf8(cluster, text[i]);
        }
        if (cluster.size() <= longest_cluster) {
            if (const auto replacement = find(cluster)) {
                out += *replacement;
                continue;
            }
        }
        for (std::string_view rest = cluster; !rest.empty();) {
            const std::string_view character = rest.substr(0, utf8_length(rest));
            out += find(character).value_or(character);
            rest.remove_prefix(character.size());
        }
    }
    return out;
}

} // namespace sd
