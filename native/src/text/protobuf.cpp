#include "text/protobuf.h"

#include "core/error.h"

namespace sd {
namespace {

enum WireType : uint32_t { VARINT = 0, FIXED64 = 1, BYTES = 2, FIXED32 = 5 };

uint64_t little_endian(std::string_view bytes) {
    uint64_t out = 0;
    for (size_t i = 0; i < bytes.size(); ++i) {
        out |= static_cast<uint64_t>(static_cast<uint8_t>(bytes[i])) << (8 * i);
    }
    return out;
}

} // namespace

void ProtoReader::wrong(const char * what) const {
    fail(Status::bad_file, "%s: %s; the file is damaged, or no SentencePiece model", where_.c_str(), what);
}

std::string_view ProtoReader::take(uint64_t n) {
    if (n > left_.size()) {
        wrong("ends inside a field");
    }
    const std::string_view out = left_.substr(0, static_cast<size_t>(n));
    left_.remove_prefix(static_cast<size_t>(n));
    return out;
}

// Seven bits a byte, the lowest first; the top bit says that more follow.
uint64_t ProtoReader::varint() {
    uint64_t out = 0;
    for (int shift = 0; shift < 64; shift += 7) {
        const auto byte = static_cast<uint8_t>(take(1)[0]);
        out |= static_cast<uint64_t>(byte & 0x7f) << shift;
        if (byte < 0x80) {
            return out;
        }
    }
    wrong("has a number of more than 64 bits");
}

std::optional<ProtoField> ProtoReader::next() {
    if (left_.empty()) {
        return std::nullopt;
    }
    const uint64_t key = varint();
    if (key >> 3 == 0 || key >> 3 > 0x1fffffff) {
        wrong("has a field of an impossible number");
    }
    ProtoField field{static_cast<uint32_t>(key >> 3), 0, {}};
    switch (key & 7) {
    case VARINT: field.value = varint(); break;
    case FIXED64: field.value = little_endian(take(8)); break;
    case BYTES: field.bytes = take(varint()); break;
    case FIXED32: field.value = little_endian(take(4)); break;
    default: wrong("has a field of an unknown kind");
    }
    return field;
}

} // namespace sd
