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
    enum class Prefix { always, first, never }; // which parts of a text between added tokens get a space in front

    std::string               where;   // the file, for messages
    std::vector<UnigramPiece> pieces;  // by id
    std::vector<AddedToken>   added;
    int32_t                   unknown = 0; // the id for what no piece covers
    std::string               charsmap;    // SentencePiece's precompiled normalisation; "": texts stay as they are
    Prefix                    prefix = Prefix::always;
    bool                      splits_spaces = true; // words are cut at any white space, else at each U+0020
    bool                      strips_right = false; // white space at the end goes first
    bool                      joins_spaces = false; // two or more U+0020 become one U+2581
};

// `path` is a spiece.model (SentencePiece's protobuf) or a tokenizer.json (transformers'), told apart by their
// content. Throws Error(io / bad_file / unsupported).
UnigramVocabulary read_unigram_vocabulary(const std::string & path);

// The same from a file's content.
UnigramVocabulary read_sentencepiece(std::string_view bytes, const std::string & where);
UnigramVocabulary read_tokenizer_json(std::string_view json, const std::string & where);

// Makes tokens of what is no plain piece, as SentencePiece marks them, and adds T5's hundred sentinels
// ("<extra_id_0>" has the highest id) where the pieces lack them. Throws Error(bad_file).
void add_special_tokens(UnigramVocabulary & vocabulary);

} // namespace sd
