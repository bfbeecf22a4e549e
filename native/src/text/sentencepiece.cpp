// Reading SentencePiece's model files: the message ModelProto of github.com/google/sentencepiece,
// src/sentencepiece_model.proto. The numbers below are the fields' there.
#include "text/unigram_vocabulary.h"

#include "core/error.h"
#include "core/half.h"
#include "core/utf8.h"
#include "text/protobuf.h"

namespace sd {
namespace {

constexpr uint64_t UNIGRAM = 1; // TrainerSpec.ModelType

UnigramPiece read_piece(std::string_view message, const std::string & where) {
    UnigramPiece piece;
    ProtoReader  reader(message, where);
    while (const auto field = reader.next()) {
        switch (field->number) {
        case 1: piece.text = std::string(field->bytes); break;
        case 2: piece.score = float_of_bits(static_cast<uint32_t>(field->value)); break;
        case 3:
            if (field->value < 1 || field->value > 6) {
                fail(Status::bad_file, "%s: has a piece of the unknown kind %llu; the file is damaged", where.c_str(),
                     static_cast<unsigned long long>(field->value));
            }
            piece.kind = static_cast<UnigramPiece::Kind>(field->value);
            break;
        default: break;
        }
    }
    return piece;
}

uint64_t read_model_type(std::string_view message, const std::string & where) {
    uint64_t    type = UNIGRAM;
    ProtoReader reader(message, where);
    while (const auto field = reader.next()) {
        type = field->number == 3 ? field->value : type;
    }
    return type;
}

std::string read_charsmap(std::string_view message, const std::string & where) {
    std::string charsmap;
    ProtoReader reader(message, where);
    while (const auto field = reader.next()) {
        charsmap = field->number == 2 ? std::string(field->bytes) : charsmap;
    }
    return charsmap;
}

} // namespace

UnigramVocabulary read_sentencepiece(std::string_view bytes, const std::string & where) {
    UnigramVocabulary out;
    out.where = where;
    ProtoReader reader(bytes, where);
    while (const auto field = reader.next()) {
        switch (field->number) {
        case 1: out.pieces.push_back(read_piece(field->bytes, where)); break;
        case 2:
            if (read_model_type(field->bytes, where) != UNIGRAM) {
                fail(Status::unsupported, "%s: is a SentencePiece model of another kind; T5's is a unigram model", where.c_str());
            }
            break;
        case 3: out.charsmap = read_charsmap(field->bytes, where); break;
        default: break;
        }
    }
    add_special_tokens(out);
    return out;
}

} // namespace sd
