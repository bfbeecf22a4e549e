// The vocabulary of a unigram tokenizer with its rules, from the files in which people have it.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace sd {

struct UnigramPiece {
    enum class Kind { normal = 1, unknown, control, user_defined, unused, byte }; // SentencePiece's numbers

    std::string text; // UTF-8, with U+2581 in the place of spaces
    double      score = 0; // the logarithm of its probability
    Kind        kind = Kind::normal;
};

// A token that is found in a text before anything else happens to it: "</s>", "<extra_id_0>".
struct AddedToken {
    std::string text;
    int32_t     id;
    bool        strips_left = false, strips_right = false; // takes the spaces beside it along
};

struct UnigramVocabulary {
    std::string               where;    // the file, for messages
    std::vector<UnigramPiece> pieces;   // by id
    std::vector<AddedToken>   added;
    int32_t                   unknown = 0; // the id for what no piece covers
    std::string               charsmap; // SentencePiece's precompiled normalisation; "": texts stay as they are
    bool                      splits_spaces = true; // words are cut at any white space, else at each U+0020
    bool                      strips_right = false; // white space at the end goes first
    bool                      joins_spaces = false; // two or more spaces become one
};

// `path` is a spiece.model (SentencePiece's protobuf) or a tokenizer.json (transformers'), told apart by their
// content; T5's hundred sentinels `<extra_id_0>` are added where the former lacks them.
// Throws Error(io / bad_file / unsupported).
UnigramVocabulary read_unigram_vocabulary(const std::string & path);

// The same from a file's content.
UnigramVocabulary read_sentencepiece(std::string_view bytes, const std::string & where);
UnigramVocabulary read_tokenizer_json(std::string_view json, const std::string & where);

} // namespace sd
