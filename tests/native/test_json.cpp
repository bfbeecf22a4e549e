#include "core/error.h"
#include "core/json.h"
#include "core/utf8.h"
#include "core/words.h"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>

using namespace sd;

namespace {

Json parse(std::string_view text) { return Json::parse(text, "a.json"); }

std::string wrong(std::string_view text) {
    try {
        parse(text);
    } catch (const Error & error) {
        CHECK(static_cast<int>(error.status) == static_cast<int>(Status::bad_file));
        CHECK(is_utf8(error.what()));
        return error.what();
    }
    return "";
}

} // namespace

TEST_CASE("every kind of value is read") {
    const Json json = parse(R"( {"b": [1, -2.5e3, true, false, null, "x", {}, []], "a": {"deep": 7}} )");
    REQUIRE(json.object());
    CHECK(json.object()->front().name == "a");
    CHECK(json.find("a")->find("deep")->integer() == 7);
    CHECK(json.find("c") == nullptr);
    const auto & list = *json.find("b")->array();
    REQUIRE(list.size() == 8);
    CHECK(list[0].number() == 1.0);
    CHECK(list[1].number() == -2500.0);
    CHECK_FALSE(list[1].integer());
    CHECK(list[2].boolean() == true);
    CHECK(list[3].boolean() == false);
    CHECK(list[4].is_null());
    CHECK(*list[5].string() == "x");
    CHECK(list[6].object()->empty());
    CHECK(list[7].array()->empty());
    CHECK(list[5].find("x") == nullptr);
}

TEST_CASE("whole numbers are exact as far as 64 bits go") {
    CHECK(parse("9223372036854775807").integer() == std::numeric_limits<int64_t>::max());
    CHECK(parse("-9223372036854775808").integer() == std::numeric_limits<int64_t>::min());
    CHECK_FALSE(parse("9223372036854775808").integer());
    CHECK(parse("9223372036854775808").number() == 9223372036854775808.0);
    CHECK_FALSE(parse("1.0").integer());
    CHECK_FALSE(parse("1e2").integer());
    CHECK(std::signbit(*parse("-0").number()));
    CHECK(parse("1e-400").number() == 0.0);
    CHECK(parse("0.1").number() == 0.1);
}

TEST_CASE("strings: escapes and UTF-8") {
    CHECK(*parse(R"("\"\\\/\b\f\n\r\t\u0041\u00e9\u20ac\ud83d\ude00")").string() ==
          "\"\\/\b\f\n\r\tA\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80");
    CHECK(*parse("\"\xc3\xa9\xf0\x9f\x98\x80\"").string() == "\xc3\xa9\xf0\x9f\x98\x80");
    CHECK(parse(R"("a\u0000b")").string()->size() == 3);
    for (const char * bad :
         {"\"\xff\"", "\"\xc0\x80\"", "\"\xed\xa0\x80\"", "\"\xf4\x90\x80\x80\"", "\"\xe2\x82\""}) {
        CHECK(wrong(bad).find("UTF-8") != std::string::npos);
    }
    for (const char * bad : {R"("\ud800")", R"("\ud800x")", R"("\ude00")", R"("\ud800\u0041")", R"("\u12g4")",
                             R"("\x")", "\"\\", "\"\n\"", "\"", "\"\\u12"}) {
        CHECK(wrong(bad) != "");
    }
}

TEST_CASE("what is no JSON is refused with the place") {
    CHECK(wrong("{\"a\": 1, \"a\": 2}") ==
          "a.json: is no valid JSON: the name 'a' twice in the object at byte 0; the file is damaged");
    CHECK(wrong("[1, 2") == "a.json: is no valid JSON: an array without end at byte 5; the file is damaged");
    for (const char * bad : {"",        " ",          "{",
                             "}",       "[",          "]",
                             "[1,]",    "[,1]",       "[1 2]",
                             "{\"a\"}", "{\"a\":}",   "{\"a\":1,}",
                             "{a:1}",   "01",         "-",
                             "+1",      ".5",         "1.",
                             "1e",      "1e+",        "- 1",
                             "0x1",     "NaN",        "Infinity",
                             "tru",     "truex",      "nul",
                             "1 2",     "{\"a\":1}}", "'a'",
                             "1e999",   "//",         "\xef\xbb\xbf{}"}) {
        CAPTURE(bad);
        CHECK(wrong(bad) != "");
    }
    CHECK(wrong(std::string_view("1\0", 2)) != "");
    CHECK(wrong(std::string_view("[\0]", 3)) != "");
}

TEST_CASE("limits hold") {
    const auto nested = [](int depth) { return std::string(depth, '[') + std::string(depth, ']'); };
    CHECK(wrong(nested(65)) == "");
    CHECK(wrong(nested(66)).find("nesting") != std::string::npos);
    CHECK(wrong(nested(1000000)).find("nesting") != std::string::npos);
    CHECK(wrong(std::string(1000000, '[')).find("nesting") != std::string::npos);
    CHECK_THROWS_WITH_AS(Json::parse("[1,2,3]", "a.json", {100, 3, 64}),
                         "a.json: is no valid JSON: too many values at byte 5; the file is damaged", Error);
    CHECK_THROWS_WITH_AS(Json::parse("[1,2,3]", "a.json", {6, 100, 64}),
                         "a.json: has 7 bytes of JSON; at most 6 are read", Error);
}

TEST_CASE("scalars in writing") {
    CHECK(parse("\"x\"").scalar_text() == "x");
    CHECK(parse("8").scalar_text() == "8");
    CHECK(parse("0.00085").scalar_text() == "0.00085");
    CHECK(parse("true").scalar_text() == "true");
    CHECK_FALSE(parse("null").scalar_text());
    CHECK_FALSE(parse("[]").scalar_text());
    CHECK(number_text(0.18215f) == "0.18215");
    CHECK(number_text(16777217.0) == "16777217");
    CHECK(number_text(1.0f / 3) == "0.33333334");
    CHECK(number_text(1.0 / 3) == "0.3333333333333333");
    CHECK(number_text(1e-5) == "1e-05");
    CHECK(number_text(-std::numeric_limits<double>::infinity()) == "-inf");
}

TEST_CASE("messages stay readable") {
    CHECK(grouped(0) == "0");
    CHECK(grouped(999) == "999");
    CHECK(grouped(1000) == "1,000");
    CHECK(grouped(4265380512u) == "4,265,380,512");
    CHECK(printable("a\nb\xff\xc3\xa9\x7f\xc2\x9b\xc2\xa0") == "a?b?\xc3\xa9??\xc2\xa0");
    CHECK(printable(std::string(1000, 'x')).size() == 203);
}
