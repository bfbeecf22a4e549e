// The regular expressions of PEFT's patterns, in time that grows with the product of both lengths: a pattern
// comes from a file, and backtracking could be made to run for years.
#include "lora/lora_config.h"

#include <cctype>

namespace sd {
namespace {

struct Token {
    char what; // itself, or 'd' or 'w' where `is_class`; any where `is_any`
    bool is_any = false, is_class = false;
    bool optional = false, repeats = false;

    bool takes(char c) const {
        const auto byte = static_cast<unsigned char>(c);
        return is_any                    ? true
               : is_class && what == 'd' ? std::isdigit(byte) != 0
               : is_class                ? std::isalnum(byte) != 0 || c == '_'
                                         : c == what;
    }
};

std::vector<Token> tokens_of(const std::string & pattern) {
    std::vector<Token> out;
    for (size_t i = 0; i < pattern.size(); ++i) {
        const char c = pattern[i];
        const bool is_last = i + 1 == pattern.size();
        if ((c == '^' && i == 0) || (c == '$' && is_last)) {
            continue;
        }
        if (c == '\\' && !is_last) {
            const char escaped = pattern[++i];
            out.push_back({escaped, false, escaped == 'd' || escaped == 'w'});
        } else if ((c == '*' || c == '+' || c == '?') && !out.empty()) {
            out.back().optional = out.back().optional || c != '+';
            out.back().repeats = out.back().repeats || c != '?';
        } else {
            out.push_back({c, c == '.'});
        }
    }
    return out;
}

// Marks what can be reached without taking a character.
void skip_optional(const std::vector<Token> & tokens, std::vector<char> & reached) {
    for (size_t i = 0; i < tokens.size(); ++i) {
        reached[i + 1] = reached[i + 1] || (reached[i] && tokens[i].optional);
    }
}

} // namespace

bool pattern_matches(const std::string & pattern, const std::string & module) {
    if (pattern == module) {
        return true;
    }
    const std::vector<Token> tokens = tokens_of(pattern);
    const bool from_begin = !pattern.empty() && pattern[0] == '^';
    std::vector<char> reached(tokens.size() + 1, 0);
    for (size_t at = 0;; ++at) {
        if (at == 0 || (!from_begin && module[at - 1] == '.')) {
            reached[0] = 1;
        }
        skip_optional(tokens, reached);
        if (at == module.size()) {
            return reached.back();
        }
        std::vector<char> next(tokens.size() + 1, 0);
        for (size_t i = 0; i < tokens.size(); ++i) {
            if (reached[i] && tokens[i].takes(module[at])) {
                next[i + 1] = 1;
                next[i] = next[i] || tokens[i].repeats;
            }
        }
        reached.swap(next);
    }
}

} // namespace sd
