// CLIP's byte-pair encoding: text to token ids, without begin, end and padding.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace sd {

class ClipBpe {
  public:
    static constexpr int32_t begin_token = 49406;
    static constexpr int32_t end_token = 49407;

    // Reads the merges (see sdcpp_py/data/README.md). Throws Error(io / bad_file).
    explicit ClipBpe(const std::string & merges_path);

    // `utf8` may hold anything: bytes that are no UTF-8 are replaced as Python's errors="replace" does.
    std::vector<int32_t> encode(std::string_view utf8) const;

  private:
    void append_text(std::string_view utf8, std::vector<int32_t> & ids) const;
    void append_word(std::u32string_view word, std::vector<int32_t> & ids) const;

    // A pair of token ids, left << 32 | right, to the token they join to. Tokens are numbered in the order of
    // the merges, so a smaller number is also an earlier merge.
    std::unordered_map<uint64_t, int32_t> joined_;
    int32_t byte_ids_[256]; // of a byte inside a word; at its end 256 more
};

} // namespace sd
