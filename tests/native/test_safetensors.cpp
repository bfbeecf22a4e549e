#include "core/words.h"
#include "files.h"

using namespace sd;
using namespace sd::test;

namespace {

std::string entry(const std::string & name, const std::string & dtype, const std::string & shape,
                  const std::string & offsets) {
    return "\"" + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":" + shape +
           ",\"data_offsets\":" + offsets + "}";
}

// The complaint about a file of this header and so many bytes of data.
std::string header_complaint(const std::string & header, size_t bytes, Status status = Status::bad_file) {
    Folder folder;
    return open_complaint(folder.write("a.safetensors", safetensors(header, std::string(bytes, '\0'))),
                          status);
}

} // namespace

TEST_CASE("tensors, types, shapes and bytes are read") {
    Folder            folder;
    const std::string header = "{\"__metadata__\":{\"format\":\"pt\",\"x\":\"\xc3\xa9\"}," +
                               entry("b", "F16", "[2,3]", "[4,16]") + "," + entry("a", "F32", "[]", "[0,4]") +
                               "," + entry("empty", "I64", "[0,5]", "[16,16]") + "," +
                               entry("five", "U8", "[1,2,1,3,2]", "[16,28]") + "}   ";
    const std::string data = "abcdefghijklmnopqrstuvwxyz!?";
    const Checkpoint  file = Checkpoint::open(folder.write("a.safetensors", safetensors(header, data)));
    REQUIRE(file.tensors().size() == 4);
    CHECK(file.metadata().at("format") == "pt");
    CHECK(file.metadata().at("x") == "\xc3\xa9");
    CHECK_FALSE(file.has("__metadata__"));

    const StoredTensor & a = *file.find("a");
    CHECK(&a == &file.tensors()[0]);
    CHECK(a.type == DType::f32);
    CHECK(a.dims == 0);
    CHECK(a.ne == Shape{1, 1, 1, 1});
    CHECK(bytes_of(a) == "abcd");

    const StoredTensor & b = *file.find("b");
    CHECK(b.type == DType::f16);
    CHECK(b.dims == 2);
    CHECK(b.ne == Shape{3, 2, 1, 1});
    CHECK(bytes_of(b) == "efghijklmnop");

    CHECK(file.find("empty")->ne == Shape{5, 0, 1, 1});
    CHECK(file.find("empty")->bytes == 0);
    CHECK(file.find("five")->dims == 5);
    CHECK(file.find("five")->ne == Shape{2, 3, 1, 2});
    CHECK(file.find("six") == nullptr);
}

TEST_CASE("every dtype of the list is known") {
    const std::pair<const char *, size_t> types[] = {
        {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1},
        {"U16", 2},  {"I16", 2}, {"F16", 2}, {"BF16", 2},    {"U32", 4},
        {"I32", 4},  {"F32", 4}, {"U64", 8}, {"I64", 8},     {"F64", 8},
    };
    for (const auto & [name, size] : types) {
        CAPTURE(name);
        CHECK(header_complaint("{" + entry("a", name, "[1]", "[0," + std::to_string(size) + "]") + "}",
                               size) == "");
    }
    const std::string unknown =
        header_complaint("{" + entry("a", "F4", "[2]", "[0,1]") + "}", 1, Status::unsupported);
    CHECK(contains(unknown, "tensor 'a' has the dtype 'F4'"));
}

TEST_CASE("files without tensors are sound") {
    CHECK(header_complaint("{}", 0) == "");
    CHECK(header_complaint("{\"__metadata__\":null}", 0) == "");
}

TEST_CASE("a header's length is checked before it is believed") {
    Folder     folder;
    const auto complaint_of = [&](uint64_t length, const std::string & rest) {
        return open_complaint(folder.write("a.safetensors", little(length, 8) + rest));
    };
    CHECK(contains(complaint_of(3, "{}"),
                   "ends after 10 bytes, inside its header of 3; the download was probably cut"));
    CHECK(contains(complaint_of(UINT64_MAX, "{}"), "18,446,744,073,709,551,615 bytes"));
    CHECK(contains(complaint_of(100'000'001, "{}"), "more than the 100,000,000"));
    CHECK(contains(complaint_of(100'000'000, "{}"), "inside its header"));
    CHECK(contains(complaint_of(0, "{}"), "no valid JSON"));
    CHECK(contains(complaint_of(1, "{}"), "no valid JSON"));
}

TEST_CASE("a file that was cut says by how much") {
    const std::string header = "{" + entry("a", "F32", "[1000,1000]", "[0,4000000]") + "}";
    const std::string message = header_complaint(header, 1234);
    CHECK(contains(message, "ends after " + grouped(8 + header.size() + 1234) + " of " +
                                grouped(8 + header.size() + 4000000) +
                                " bytes; the download was probably cut"));
    CHECK(contains(header_complaint(header, 4000001), "but its tensors end after"));
    CHECK(header_complaint(header, 4000000) == "");
}

TEST_CASE("lying headers are refused") {
    const auto wrong = [](const std::string & member, size_t bytes = 8) {
        return header_complaint("{" + member + "}", bytes);
    };
    CHECK(contains(wrong("\"a\":1"), "has no dtype"));
    CHECK(contains(wrong("\"a\":{\"dtype\":1}"), "has no dtype"));
    CHECK(contains(wrong("\"a\":{\"dtype\":\"F32\"}"), "has no shape"));
    CHECK(contains(wrong("\"a\":{\"dtype\":\"F32\",\"shape\":[2]}"), "has no data_offsets"));
    CHECK(contains(wrong(entry("a", "F32", "[-2]", "[0,8]")), "whole numbers"));
    CHECK(contains(wrong(entry("a", "F32", "[2.0]", "[0,8]")), "whole numbers"));
    CHECK(contains(wrong(entry("a", "F32", "[\"2\"]", "[0,8]")), "whole numbers"));
    CHECK(contains(wrong(entry("a", "F32", "[2]", "[0]")), "not a begin and an end"));
    CHECK(contains(wrong(entry("a", "F32", "[2]", "[0,8,8]")), "not a begin and an end"));
    CHECK(contains(wrong(entry("a", "F32", "[2]", "[8,0]")), "not a begin and an end"));
    CHECK(contains(wrong(entry("a", "F32", "[3]", "[0,8]")), "has 8 bytes, but [3] of type f32 takes 12"));
    CHECK(contains(wrong(entry("a", "F32", "[4294967296,4294967296]", "[0,8]")), "impossible shape"));
    CHECK(contains(
        wrong(entry("a", "U8", "[9223372036854775807]", "[9223372036854775800,9223372036854775807]")),
        "has 7 bytes"));
    CHECK(contains(wrong(entry("a", "U8", "[1]", "[9223372036854775806,9223372036854775807]")),
                   "impossible data_offsets"));
    CHECK(contains(wrong(entry("a", "F32", "[18446744073709551616]", "[0,8]")), "whole numbers"));
    CHECK(contains(wrong(entry("a", "F32", "[1]", "[4,8]")), "begins at byte 4 of the data, where 0 is due"));
    CHECK(contains(wrong(entry("a", "F32", "[1]", "[0,4]")), "but its tensors end after"));
    CHECK(contains(wrong(entry("a", "F32", "[1]", "[0,4]") + "," + entry("b", "F16", "[3]", "[2,8]")),
                   "begins at byte 2 of the data, where 4 is due"));
    CHECK(contains(wrong(entry("a", "F32", "[2]", "[0,8]") + "," + entry("a", "F32", "[2]", "[0,8]")),
                   "twice"));
    CHECK(contains(wrong("\"__metadata__\":{\"a\":1}", 0), "is no string"));
    CHECK(contains(wrong("\"__metadata__\":[]", 0), "is no object"));
}
