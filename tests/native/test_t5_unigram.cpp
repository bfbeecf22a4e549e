#include "core/error.h"
#include "core/half.h"
#include "files.h"
#include "text/charsmap.h"
#include "text/protobuf.h"
#include "text/t5_unigram.h"

#include <doctest/doctest.h>

#include <cmath>
#include <vector>

using namespace sd;
using namespace sd::test;
using Kind = UnigramPiece::Kind;

namespace {

std::string varint(uint64_t value) {
    std::string out;
    for (; value >= 0x80; value >>= 7) {
        out += static_cast<char>(value | 0x80);
    }
    return out + static_cast<char>(value);
}

std::string bytes_field(uint32_t number, const std::string & bytes) {
    return varint(number << 3 | 2) + varint(bytes.size()) + bytes;
}

std::string u32_bytes(uint32_t value) {
    std::string out;
    for (int i = 0; i < 4; ++i) {
        out += static_cast<char>(value >> (8 * i));
    }
    return out;
}

std::string piece(const std::string & text, float score, int kind = 1) {
    return bytes_field(1, bytes_field(1, text) + varint(2 << 3 | 5) + u32_bytes(bits_of_float(score)) + varint(3 << 3) +
                              varint(kind));
}

const std::string START = piece("<pad>", 0, 3) + piece("</s>", 0, 3) + piece("<unk>", 0, 2);

// Ids from 3 on are those of the pieces.
T5Unigram tokenizer(std::vector<UnigramPiece> pieces) {
    UnigramVocabulary vocabulary;
    vocabulary.where = "test";
    vocabulary.unknown = 2;
    vocabulary.pieces = {{"<pad>", 0, Kind::control}, {"</s>", 0, Kind::control}, {"<unk>", 0, Kind::unknown}};
    vocabulary.pieces.insert(vocabulary.pieces.end(), pieces.begin(), pieces.end());
    return T5Unigram(std::move(vocabulary));
}

using Ids = std::vector<int32_t>;

} // namespace

TEST_CASE("protobuf: every kind of field, in order") {
    const std::string where = "test";
    const std::string message = varint(1 << 3) + varint(300) + bytes_field(2, "ab") + varint(3 << 3 | 5) + u32_bytes(7) +
                                varint(4 << 3 | 1) + u32_bytes(1) + u32_bytes(2) + varint(2000 << 3) + varint(UINT64_MAX);
    ProtoReader       reader(message, where);
    auto              field = reader.next();
    CHECK((field->number == 1 && field->value == 300));
    field = reader.next();
    CHECK((field->number == 2 && field->bytes == "ab"));
    field = reader.next();
    CHECK((field->number == 3 && field->value == 7));
    field = reader.next();
    CHECK((field->number == 4 && field->value == (uint64_t{2} << 32 | 1)));
    field = reader.next();
    CHECK((field->number == 2000 && field->value == UINT64_MAX));
    CHECK_FALSE(reader.next());
}

TEST_CASE("protobuf: what is damaged is refused") {
    const std::string where = "test";
    for (const std::string & message :
         {std::string("\x0a"), std::string("\x0a\x05" "abcd"), std::string("\x08"), std::string("\x08\x80"),
          std::string("\x0d" "abc"), std::string("\x0b"), std::string("\x07"), std::string("\x02\x00", 2),
          "\x08" + std::string(10, '\xff'), "\x0a" + varint(UINT64_MAX)}) {
        CAPTURE(message);
        ProtoReader reader(message, where);
        CHECK_FALSE(complaint([&] { while (reader.next()) {} }, Status::bad_file).empty());
    }
}

TEST_CASE("spiece.model: pieces, their kinds, the normalisation and T5's sentinels") {
    const std::string       model = START + piece("\u2581a", -1.5f) + piece("<x>", -7, 4) + bytes_field(3, bytes_field(2, "map"));
    const UnigramVocabulary read = read_sentencepiece(model, "test");
    REQUIRE(read.pieces.size() == 105);
    CHECK(read.pieces[3].text == "\u2581a");
    CHECK(read.pieces[3].score == -1.5);
    CHECK(read.pieces[5].text == "<extra_id_99>");
    CHECK(read.pieces[104].text == "<extra_id_0>");
    CHECK(read.unknown == 2);
    CHECK(read.added.size() == 104);
    CHECK(read.charsmap == "map");

    CHECK(read_sentencepiece(START + piece("<extra_id_0>", 0, 4), "test").pieces.size() == 4);
    const auto refused = [](const std::string & bytes, Status status) {
        return complaint([&] { read_sentencepiece(bytes, "test"); }, status);
    };
    CHECK(contains(refused(piece("a", 0), Status::bad_file), "no piece for what is unknown"));
    CHECK(contains(refused(START + piece("?", 0, 2), Status::bad_file), "two pieces for what is unknown"));
    CHECK(contains(refused(START + piece("?", 0, 7), Status::bad_file), "unknown kind 7"));
    CHECK(contains(refused(START + bytes_field(2, varint(3 << 3) + varint(2)), Status::unsupported), "unigram"));
}

TEST_CASE("unigram: the cut with the largest sum of scores, the first of two alike") {
    const std::string space = "\u2581";
    const T5Unigram   t5 = tokenizer({{space, -2}, {"a", -3}, {"b", -3}, {"ab", -5}, {space + "a", -4}, {"abc", -20}});
    CHECK(t5.encode("ab") == Ids{3, 6});         // _ ab: -7, and _a b: -7, whose last piece begins later
    CHECK(t5.encode("aab") == Ids{7, 6});        // _a ab: -9, _a a b: -10
    CHECK(t5.encode("b") == Ids{3, 5});
    CHECK(t5.encode("") == Ids{});
    CHECK(t5.encode(" \t\n ") == Ids{});
    CHECK(t5.encode("  a  b ") == Ids{7, 3, 5});
    CHECK(t5.encode("abc") == Ids{3, 8});        // unknown c would cost 30
    CHECK(t5.encode("xyz a") == Ids{3, 2, 7});   // unknown neighbours are one
    CHECK(t5.encode("xax") == Ids{3, 2, 4, 2});
    CHECK(t5.encode("\xff") == Ids{3, 2});
    CHECK(t5.size() == 9);
}

TEST_CASE("unigram: of two pieces alike the later counts, and what is no plain piece is not met in a text") {
    const std::string space = "\u2581";
    CHECK(tokenizer({{space + "a", -1}, {space + "a", -2}}).encode("a") == Ids{4});
    CHECK(tokenizer({{space, -1}, {"a", -1, Kind::unused}, {"b", -1, Kind::byte}}).encode("ab") == Ids{3, 2});
}

TEST_CASE("unigram: added tokens are found first, the longest of them, with the spaces that they take") {
    UnigramVocabulary vocabulary;
    vocabulary.unknown = 0;
    vocabulary.pieces = {{"?", 0, Kind::unknown}, {"\u2581", -1}, {"a", -1}, {"b", -1}};
    vocabulary.added = {{"<x>", 10}, {"<x>>", 11}, {"<y>", 12, true, true}};
    const T5Unigram t5(std::move(vocabulary));
    CHECK(t5.encode("a<x>b") == Ids{1, 2, 10, 1, 3});
    CHECK(t5.encode("<x>>") == Ids{11});
    CHECK(t5.encode("a <y>  b") == Ids{1, 2, 12, 1, 3});
    CHECK(t5.size() == 13);
}

TEST_CASE("unigram: what no tokenizer could work with is refused") {
    CHECK(contains(complaint([] { tokenizer({{"a", -INFINITY}}); }, Status::bad_file), "score -inf"));
    CHECK(contains(complaint([] { T5Unigram({}); }, Status::bad_file), "no pieces"));
    UnigramVocabulary vocabulary;
    vocabulary.pieces = {{"a", 0}};
    vocabulary.added = {{"", 1}};
    CHECK(contains(complaint([&] { T5Unigram{vocabulary}; }, Status::bad_file), "is empty"));
}

// A trie of the keys "A" and "A\u0301" would have their second parts in reach of one; here each has one letter.
static std::string charsmap_of(char key, const std::string & replacement, uint32_t value = 0) {
    // The root's children lie at offset 256 ^ letter, the value of the key at its own place ^ 512.
    std::vector<uint32_t> units(1024, 0);
    units[0] = 256u << 10;
    const uint32_t at = 256u ^ static_cast<uint8_t>(key);
    units[at] = 512u << 10 | 1u << 8 | static_cast<uint8_t>(key);
    units[at ^ 512u] = 1u << 31 | value;
    std::string trie;
    for (const uint32_t unit : units) {
        trie += u32_bytes(unit);
    }
    return u32_bytes(static_cast<uint32_t>(trie.size())) + trie + replacement;
}

TEST_CASE("charsmap: characters and whole clusters of at most five bytes are replaced") {
    const Charsmap map(charsmap_of('a', std::string("xy\0", 3)), "test");
    CHECK(map.normalise(U"bab") == "bxyb");
    CHECK(map.normalise(U"a\u0301b") == "xyb");                   // the mark goes with its cluster
    CHECK(map.normalise(U"a\u0301\u0301\u0301") == "xy\u0301\u0301\u0301"); // seven bytes
    CHECK(map.normalise(U"a\u200b") == "xy\u200b");
    CHECK(map.normalise(U"") == "");
}

TEST_CASE("charsmap: a damaged one is refused, at once or where it is used") {
    const auto refused = [](const std::string & bytes) {
        return complaint([&] { Charsmap(bytes, "test").normalise(U"abc"); }, Status::bad_file);
    };
    CHECK(contains(refused(""), "0 bytes"));
    CHECK(contains(refused(u32_bytes(0)), "a trie of 0"));
    CHECK(contains(refused(u32_bytes(6) + "123456"), "a trie of 6"));
    CHECK(contains(refused(u32_bytes(8) + "1234"), "a trie of 8"));
    CHECK(contains(refused(charsmap_of('a', "no end")), "outside itself"));
    CHECK(contains(refused(charsmap_of('a', std::string("x\0", 2), 2)), "outside itself"));
    CHECK(contains(refused(charsmap_of('a', std::string(257, 'x') + '\0')), "outside itself"));
}
