#include "files.h"

#include "core/error.h"
#include "text/clip_bpe.h"
#include "text/unicode.h"

#include <doctest/doctest.h>

#include <cstdlib>
#include <string>

using Ids = std::vector<int32_t>;
using namespace std::string_literals;

namespace {

// SDCPP_DATA_DIR is defined by the build and may be overridden when the tests run elsewhere.
std::string merges_path() {
    const char * folder = std::getenv("SDCPP_DATA_DIR");
    return std::string(folder ? folder : SDCPP_DATA_DIR) + "/clip_merges.txt";
}

const sd::ClipBpe & clip() {
    static const sd::ClipBpe bpe(merges_path());
    return bpe;
}

} // namespace

TEST_CASE("CLIP splits words, contractions, digits and symbols") {
    CHECK(clip().encode("a red heart") == Ids{320, 736, 1936});
    CHECK(clip().encode("A  RED\n\theart ") == Ids{320, 736, 1936});
    CHECK(clip().encode("don't DON'T") == Ids{847, 713, 847, 713});
    CHECK(clip().encode("!'s it''s 'sx") == Ids{13222, 338, 585, 8445, 338, 568, 343});
    CHECK(clip().encode("１２") == Ids{171, 120, 495, 171, 120, 496});
    CHECK(clip().encode("") == Ids{});
    CHECK(clip().encode(" \u0085\u3000") == Ids{});
}

TEST_CASE("CLIP composes and lowers letters of any script") {
    CHECK(clip().encode("é") == Ids{4166});
    CHECK(clip().encode("E\u0301") == Ids{4166});
    CHECK(clip().encode("猫の絵") == Ids{163, 234, 104, 21575, 37810, 369});
    CHECK(clip().encode("İstanbul") == Ids{328, 16384, 11231});
    CHECK(clip().encode("👩‍🚀🇩🇪") == Ids{26304, 22400, 21531});
}

TEST_CASE("CLIP takes any byte") {
    CHECK(clip().encode("a\0b"s) == Ids{320, 444, 321});
    CHECK(clip().encode("\xff") == clip().encode("\ufffd"));
    CHECK(clip().encode("\xf0\x9f\x9a") == clip().encode("\ufffd"));
    CHECK(clip().encode("\xed\xa0\x80") == clip().encode("\ufffd\ufffd\ufffd"));
    CHECK(clip().encode("a\xc3") == clip().encode("a\ufffd"));
}

TEST_CASE("the end token counts as it is written, the begin token in any case") {
    CHECK(clip().encode("a<|endoftext|>b<|startoftext|>") == Ids{320, 49407, 321, 49406});
    CHECK(clip().encode("<|ENDOFTEXT|>") == Ids{27, 347, 40786, 4160, 91, 285});
    CHECK(clip().encode("a<|StartOfText|>") == Ids{320, 49406});
    CHECK(clip().encode("<|endoftext|") == Ids{27, 347, 40786, 4160, 347});
}

TEST_CASE("a long word takes no longer per letter than a short one") {
    CHECK(clip().encode(std::string(1'000'000, 'a')).size() == 125001);
}

TEST_CASE("normal form C") {
    using sd::unicode::normal_form_c;
    CHECK(normal_form_c(U"\u1112\u1161\u11ab") == U"\ud55c");  // Hangul by rule
    CHECK(normal_form_c(U"a\u0301\u0323") == U"\u1ea1\u0301"); // marks are put in order first
    CHECK(normal_form_c(U"\u0344") == U"\u0308\u0301");        // never composed again
    CHECK(normal_form_c(U"\u212b") == U"\u00c5");              // a single substitute
    CHECK(normal_form_c(U"") == U"");
}

TEST_CASE("a file that holds no merges of CLIP is an error with its line") {
    sd::test::Folder folder;
    const auto       write = [&](const char * name, const std::string & text) { return folder.write(name, text); };
    CHECK_THROWS_WITH_AS(sd::ClipBpe("no such file"), doctest::Contains("no such file: "), sd::Error);
    CHECK_THROWS_WITH_AS(sd::ClipBpe(write("empty.txt", "")), doctest::Contains("has 0 merges"), sd::Error);
    CHECK_THROWS_WITH_AS(sd::ClipBpe(write("short.txt", "i n\nt h\n")), doctest::Contains("has 2 merges"),
                         sd::Error);
    CHECK_THROWS_WITH_AS(sd::ClipBpe(write("twice.txt", "i n\ni n\n")), doctest::Contains("line 2"),
                         sd::Error);
    CHECK_THROWS_WITH_AS(sd::ClipBpe(write("odd.txt", "#version: 0.2\nin\n")), doctest::Contains("line 2"),
                         sd::Error);
    CHECK_THROWS_WITH_AS(sd::ClipBpe(write("long.txt", std::string(1 << 20, 'x'))),
                         doctest::Contains("line 1"), sd::Error);
    CHECK_THROWS_AS(sd::ClipBpe("."), sd::Error); // a folder
}
