// The normalisation that SentencePiece compiles into its models ("nmt_nfkc" in T5): a double-array trie from
// sequences of characters to their replacements. Its format:
//
//   u32 size of the trie in bytes, the trie, the replacements, each with a final 0; little endian
//   trie: units of 32 bits. Of a unit the bits 31 and 0..7 are its label, the byte that leads to it; bit 8 says that
//         a key ends here, whose value is in the unit at its offset (bits 0..30: where the replacement begins);
//         bits 10..30, times 256 where bit 9 is set, are the offset: the children lie at
//         own place ^ offset ^ byte.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace sd {

class Charsmap {
  public:
    // `where` names the file in messages. Throws Error(bad_file).
    Charsmap(std::string_view bytes, std::string where);

    // As huggingface's tokenizers apply it: a cluster of characters that are shown as one (Unicode's annex 29) of
    // at most five bytes is replaced as a whole by what its shortest known prefix becomes; other clusters
    // character by character. SentencePiece itself takes the longest prefixes of the text.
    std::string normalise(const std::u32string & text) const;

  private:
    std::optional<std::string_view> find(std::string_view key) const;

    std::string           where_;
    std::vector<uint32_t> units_;
    std::string           replacements_;
};

} // namespace sd
