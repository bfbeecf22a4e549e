#include "text/unigram_vocabulary.h"

#include "core/error.h"
#include "core/file.h"

namespace sd {

constexpr int SENTINELS = 100;

UnigramVocabulary read_unigram_vocabulary(const std::string & path) {
    const MappedFile       file(path);
    const std::string_view bytes(reinterpret_cast<const char *>(file.data()), file.size());
    const size_t           first = bytes.find_first_not_of(" \t\r\n");
    // A protobuf begins with 0x0a, the key of its first piece, which is white space to JSON.
    const bool is_json = first != std::string_view::npos && bytes[first] == '{' && bytes[0] != '\n';
    return is_json ? read_tokenizer_json(bytes, path) : read_sentencepiece(bytes, path);
}

void add_special_tokens(UnigramVocabulary & vocabulary) {
    using Kind = UnigramPiece::Kind;
    bool has_sentinels = false, has_unknown = false;
    for (const UnigramPiece & piece : vocabulary.pieces) {
        has_sentinels = has_sentinels || piece.text == "<extra_id_0>";
    }
    for (int i = SENTINELS - 1; i >= 0 && !has_sentinels; --i) { // the last one comes first
        vocabulary.pieces.push_back({"<extra_id_" + std::to_string(i) + ">", 0, Kind::user_defined});
    }
    for (size_t id = 0; id < vocabulary.pieces.size(); ++id) {
        UnigramPiece & piece = vocabulary.pieces[id];
        if (piece.kind == Kind::unknown) {
            if (has_unknown) {
                fail(Status::bad_file, "%s: has two pieces for what is unknown; the file is damaged", vocabulary.where.c_str());
            }
            vocabulary.unknown = static_cast<int32_t>(id);
            has_unknown = true;
        }
        if (piece.kind == Kind::unknown || piece.kind == Kind::control || piece.kind == Kind::user_defined) {
            piece.score = 0;
            vocabulary.added.push_back({piece.text, static_cast<int32_t>(id)});
        }
    }
    if (!has_unknown) {
        fail(Status::bad_file, "%s: has no piece for what is unknown (of %zu); is it a SentencePiece model?",
             vocabulary.where.c_str(), vocabulary.pieces.size());
    }
}

} // namespace sd
