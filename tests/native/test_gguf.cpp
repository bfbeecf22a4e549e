#include "files.h"

using namespace sd;
using namespace sd::test;

namespace {

std::string text_of(const std::string & text) { return little(text.size(), 8) + text; }

std::string value(const std::string & key, uint32_t type, const std::string & bytes) {
    return text_of(key) + little(type, 4) + bytes;
}

std::string tensor(const std::string & name, const std::vector<uint64_t> & ne, DType type, uint64_t offset) {
    std::string out = text_of(name) + little(ne.size(), 4);
    for (const uint64_t length : ne) {
        out += little(length, 8);
    }
    return out + little(static_cast<uint64_t>(type), 4) + little(offset, 8);
}

std::string gguf(const std::vector<std::string> & values, const std::vector<std::string> & tensors,
                 const std::string & data, size_t alignment = 32, uint32_t version = 3) {
    std::string out = "GGUF" + little(version, 4) + little(tensors.size(), 8) + little(values.size(), 8);
    for (const std::string & part : values) {
        out += part;
    }
    for (const std::string & part : tensors) {
        out += part;
    }
    return out + std::string((alignment - out.size() % alignment) % alignment, '\0') + data;
}

std::string bytes_complaint(const std::string & bytes, Status status = Status::bad_file) {
    Folder folder;
    return open_complaint(folder.write("a.gguf", bytes), status);
}

} // namespace

TEST_CASE("tensors and metadata are read") {
    const std::string long_name =
        "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.attn2.to_out.0.weight";
    const std::string data = std::string(34, 'q') + std::string(30, '\0') + "abcdefgh";
    const std::string bytes =
        gguf({value("u8", 0, "\xff"), value("i8", 1, "\xff"), value("u16", 2, little(65535, 2)),
              value("i16", 3, little(65535, 2)), value("u32", 4, little(4294967295u, 4)),
              value("i32", 5, little(4294967295u, 4)), value("f32", 6, little(0x3e3a8588, 4)),
              value("bool", 7, std::string(1, '\1')), value("string", 8, text_of("sd\xc3\xa9")),
              value("u64", 10, little(UINT64_MAX, 8)), value("i64", 11, little(UINT64_MAX, 8)),
              value("f64", 12, little(0x3fe0000000000000, 8)),
              value("tokens", 9, little(8, 4) + little(2, 8) + text_of("a") + text_of("")),
              value("scores", 9, little(6, 4) + little(3, 8) + std::string(12, 'x')),
              value("nested", 9, little(9, 4) + little(1, 8) + little(0, 4) + little(2, 8) + "xy")},
             {tensor(long_name, {32}, DType::q8_0, 0), tensor("b", {2, 1, 2}, DType::f16, 64)}, data);
    Folder                                   folder;
    const Checkpoint                         file = Checkpoint::open(folder.write("a.gguf", bytes));
    const std::map<std::string, std::string> expected = {
        {"u8", "255"},      {"i8", "-1"},          {"u16", "65535"},
        {"i16", "-1"},      {"u32", "4294967295"}, {"i32", "-1"},
        {"f32", "0.18215"}, {"bool", "true"},      {"string", "sd\xc3\xa9"},
        {"i64", "-1"},      {"f64", "0.5"},        {"u64", "18446744073709551615"}};
    CHECK(file.metadata() == expected);
    REQUIRE(file.tensors().size() == 2);
    const StoredTensor & a = *file.find(long_name);
    CHECK(a.type == DType::q8_0);
    CHECK(a.ne == Shape{32, 1, 1, 1});
    CHECK(bytes_of(a) == std::string(34, 'q'));
    const StoredTensor & b = *file.find("b");
    CHECK(b.dims == 3);
    CHECK(b.ne == Shape{2, 1, 2, 1});
    CHECK(bytes_of(b) == "abcdefgh");
}

TEST_CASE("alignment is the file's own") {
    const auto aligned = [](uint32_t alignment) {
        return gguf({value("general.alignment", 4, little(alignment, 4))}, {tensor("a", {4}, DType::i8, 0)},
                    "abcd", alignment ? alignment : 32);
    };
    Folder folder;
    for (const uint32_t alignment : {1u, 8u, 64u, 4096u}) {
        const Checkpoint file = Checkpoint::open(folder.write("a.gguf", aligned(alignment)));
        CHECK(bytes_of(*file.find("a")) == "abcd");
    }
    CHECK(contains(bytes_complaint(aligned(0)), "power of two"));
    CHECK(contains(bytes_complaint(aligned(24)), "power of two"));
    CHECK(contains(bytes_complaint(gguf({value("general.alignment", 10, little(32, 8))}, {}, "")),
                   "power of two"));
    CHECK(contains(bytes_complaint(gguf({}, {tensor("a", {4}, DType::i8, 8)}, std::string(64, '\0'))),
                   "multiple"));
}

TEST_CASE("other versions get a sentence") {
    CHECK(bytes_complaint(gguf({}, {}, "", 32, 2)) == "");
    CHECK(contains(bytes_complaint(gguf({}, {}, "", 32, 1), Status::unsupported), "version 1"));
    CHECK(contains(bytes_complaint(gguf({}, {}, "", 32, 4), Status::unsupported), "version 4"));
    CHECK(contains(bytes_complaint(gguf({}, {}, "", 32, 0), Status::unsupported), "version 0"));
    CHECK(contains(bytes_complaint(gguf({}, {}, "", 32, 3u << 24), Status::unsupported), "big-endian"));
}

TEST_CASE("types that GGUF does not have are refused") {
    for (const uint32_t type : {4u, 5u, 31u, 36u, 999u, 1000u, 1003u, 0xffffffffu}) {
        CAPTURE(type);
        const std::string bytes =
            gguf({}, {tensor("a", {32}, static_cast<DType>(type), 0)}, std::string(256, '\0'));
        CHECK(contains(bytes_complaint(bytes, Status::unsupported), "type number " + std::to_string(type)));
    }
}

TEST_CASE("lying numbers are refused") {
    const auto one = [](const std::string & tensor, size_t bytes = 64) {
        return bytes_complaint(gguf({}, {tensor}, std::string(bytes, '\0')));
    };
    CHECK(contains(one(tensor("a", {1, 1, 1, 1, 1}, DType::f32, 0)), "has 5 dimensions"));
    CHECK(contains(one(tensor("a", {33}, DType::q8_0, 0)), "impossible shape [33]"));
    CHECK(contains(one(tensor("a", {}, DType::q8_0, 0)), "impossible shape"));
    CHECK(contains(one(tensor("a", {1ull << 32, 1ull << 32}, DType::f32, 0)), "impossible shape"));
    CHECK(contains(one(tensor("a", {UINT64_MAX}, DType::i8, 0)), "impossible shape"));
    CHECK(contains(one(tensor("a", {1ull << 62}, DType::i8, 1ull << 62)), "multiple"));
    CHECK(contains(one(tensor("a", {(1ull << 62)}, DType::i8, (1ull << 62) - 32)), "ends after 128 of"));
    CHECK(contains(one(tensor("a", {17}, DType::f32, 0)), "ends after 128 of 132 bytes"));
    CHECK(contains(one(tensor("a", {1}, DType::f32, 64)), "ends after"));
    CHECK(one(tensor("a", {0}, DType::f32, 64)) == "");
    CHECK(
        contains(bytes_complaint(gguf({}, {tensor("a", {9}, DType::f32, 0), tensor("b", {1}, DType::f32, 32)},
                                      std::string(64, '\0'))),
                 "the data of 'a' and 'b' overlap"));
    CHECK(
        contains(bytes_complaint(gguf({}, {tensor("a", {8}, DType::f32, 0), tensor("a", {1}, DType::f32, 32)},
                                      std::string(64, '\0'))),
                 "'a' stands twice"));
    CHECK(contains(bytes_complaint(gguf({value("k", 0, "x"), value("k", 0, "x")}, {}, "")),
                   "'k' stands twice"));
    CHECK(contains(bytes_complaint(gguf({value("k", 13, "x")}, {}, "")), "unknown type 13"));
    CHECK(contains(bytes_complaint(gguf({value("\xff", 0, "x")}, {}, "")),
                   "the metadata key '?' is not UTF-8"));
    CHECK(contains(bytes_complaint(gguf({value(std::string(65536, 'k'), 0, "x")}, {}, "")), "65,536 bytes"));
    CHECK(bytes_complaint(gguf({}, {tensor(std::string(65535, 'n'), {1}, DType::f32, 0)}, "abcd")) == "");
    const std::string counts = "GGUF" + little(3, 4);
    CHECK(contains(bytes_complaint(counts + little(UINT64_MAX, 8) + little(0, 8)),
                   "18,446,744,073,709,551,615 tensors"));
    CHECK(contains(bytes_complaint(counts + little(0, 8) + little(1000, 8)), "1,000 metadata values"));
    const std::string long_array = little(8, 4) + little(UINT64_MAX / 8, 8);
    CHECK(contains(bytes_complaint(gguf({value("k", 9, long_array)}, {}, "")), "array elements"));
    CHECK(
        contains(bytes_complaint(gguf({value("k", 8, little(UINT64_MAX, 8))}, {}, "")), "inside its header"));
    std::string nested;
    for (int i = 0; i < 100000; ++i) {
        nested += little(9, 4) + little(1, 8);
    }
    CHECK(contains(bytes_complaint(gguf({value("k", 9, nested)}, {}, "")), "arrays inside arrays"));
}

TEST_CASE("every cut is an error") {
    const std::string bytes =
        gguf({value("a", 8, text_of("text")), value("b", 9, little(8, 4) + little(1, 8) + text_of("x"))},
             {tensor("t", {4}, DType::f32, 0)}, std::string(16, 'd'));
    for (size_t length = 0; length < bytes.size(); ++length) {
        CAPTURE(length);
        CHECK(bytes_complaint(bytes.substr(0, length)) != "");
    }
    CHECK(bytes_complaint(bytes) == "");
    CHECK(bytes_complaint(bytes + std::string(32, '\0')) == "");
}
