#include "checkpoint/safetensors.h"

#include "checkpoint/shape.h"
#include "core/error.h"
#include "core/json.h"
#include "core/words.h"

#include <algorithm>
#include <tuple>

namespace sd {
namespace {

constexpr size_t LENGTH_BYTES = 8;
constexpr size_t LARGEST_HEADER = 100'000'000;

struct TypeName {
    const char * name;
    DType        type;
};

constexpr TypeName TYPE_NAMES[] = {
    {"BOOL", DType::boolean}, {"U8", DType::u8},           {"I8", DType::i8},           {"U16", DType::u16},
    {"I16", DType::i16},      {"F16", DType::f16},         {"BF16", DType::bf16},       {"I32", DType::i32},
    {"U32", DType::u32},      {"F32", DType::f32},         {"I64", DType::i64},         {"U64", DType::u64},
    {"F64", DType::f64},      {"F8_E4M3", DType::f8_e4m3}, {"F8_E5M2", DType::f8_e5m2},
};

uint64_t header_length(const MappedFile & file) {
    uint64_t out = 0;
    for (size_t i = 0; i < LENGTH_BYTES; ++i) {
        out |= static_cast<uint64_t>(file.data()[i]) << (8 * i);
    }
    return out;
}

// One entry of the header.
class Entry {
  public:
    Entry(const MappedFile & file, const JsonMember & member) : file_(file), member_(member) {}

    StoredTensor read(size_t data_begin) const {
        StoredTensor tensor{};
        tensor.name = member_.name;
        tensor.file = &file_;
        tensor.type = type();
        std::vector<uint64_t> lengths = numbers("shape");
        if (!set_shape(tensor, {lengths.rbegin(), lengths.rend()})) {
            wrong("has the impossible shape " + shape_text(lengths));
        }
        const std::vector<uint64_t> offsets = numbers("data_offsets");
        if (offsets.size() != 2 || offsets[0] > offsets[1]) {
            wrong("has the data_offsets " + shape_text(offsets) + ", not a begin and an end");
        }
        if (offsets[1] - offsets[0] != tensor.bytes) {
            wrong("has " + grouped(offsets[1] - offsets[0]) + " bytes, but " + shape_text(lengths) +
                  " of type " + dtype_name(tensor.type) + " takes " + grouped(tensor.bytes));
        }
        if (offsets[1] > static_cast<uint64_t>(INT64_MAX) - data_begin) {
            wrong("has the impossible data_offsets " + shape_text(offsets));
        }
        tensor.offset = data_begin + static_cast<size_t>(offsets[0]);
        return tensor;
    }

  private:
    [[noreturn]] void wrong(const std::string & what) const {
        fail(Status::bad_file, "%s: tensor '%s' %s; the file is damaged", file_.path().c_str(),
             printable(member_.name).c_str(), what.c_str());
    }

    DType type() const {
        const Json *        value = member_.value.find("dtype");
        const std::string * name = value ? value->string() : nullptr;
        if (!name) {
            wrong("has no dtype");
        }
        for (const TypeName & known : TYPE_NAMES) {
            if (*name == known.name) {
                return known.type;
            }
        }
        fail(Status::unsupported,
             "%s: tensor '%s' has the dtype '%s', which is not read here; save it as F16 or BF16",
             file_.path().c_str(), printable(member_.name).c_str(), printable(*name).c_str());
    }

    std::vector<uint64_t> numbers(const char * key) const {
        const Json *              value = member_.value.find(key);
        const std::vector<Json> * array = value ? value->array() : nullptr;
        if (!array) {
            wrong(text("has no %s", key));
        }
        std::vector<uint64_t> out;
        for (const Json & element : *array) {
            const std::optional<int64_t> number = element.integer();
            if (!number || *number < 0) {
                wrong(text("has a %s that is not of whole numbers from 0", key));
            }
            out.push_back(static_cast<uint64_t>(*number));
        }
        return out;
    }

    const MappedFile & file_;
    const JsonMember & member_;
};

void read_metadata(const MappedFile & file, const Json & value,
                   std::map<std::string, std::string> & metadata) {
    if (value.is_null()) {
        return;
    }
    if (!value.object()) {
        fail(Status::bad_file, "%s: its __metadata__ is no object; the file is damaged", file.path().c_str());
    }
    for (const JsonMember & member : *value.object()) {
        if (!member.value.string()) {
            fail(Status::bad_file, "%s: '%s' in its __metadata__ is no string; the file is damaged",
                 file.path().c_str(), printable(member.name).c_str());
        }
        metadata.emplace(member.name, *member.value.string());
    }
}

// Tensors have to lie side by side from the data's begin to the file's end.
void check_cover(const MappedFile & file, std::vector<StoredTensor> & tensors, size_t data_begin) {
    std::sort(tensors.begin(), tensors.end(), [](const StoredTensor & a, const StoredTensor & b) {
        return std::tie(a.offset, a.bytes, a.name) < std::tie(b.offset, b.bytes, b.name);
    });
    size_t end = data_begin;
    for (const StoredTensor & tensor : tensors) {
        if (tensor.offset != end) {
            fail(Status::bad_file,
                 "%s: tensor '%s' begins at byte %s of the data, where %s is due; the file is damaged",
                 file.path().c_str(), printable(tensor.name).c_str(),
                 grouped(tensor.offset - data_begin).c_str(), grouped(end - data_begin).c_str());
        }
        end += tensor.bytes;
    }
    if (file.size() < end) {
        fail(Status::bad_file, "%s: ends after %s of %s bytes; the download was probably cut",
             file.path().c_str(), grouped(file.size()).c_str(), grouped(end).c_str());
    }
    if (file.size() > end) {
        fail(Status::bad_file, "%s: has %s bytes, but its tensors end after %s; the file is damaged",
             file.path().c_str(), grouped(file.size()).c_str(), grouped(end).c_str());
    }
}

} // namespace

bool is_safetensors(const MappedFile & file) {
    return file.size() > LENGTH_BYTES && file.data()[LENGTH_BYTES] == '{';
}

std::vector<StoredTensor> read_safetensors(const MappedFile & file,
                                           std::map<std::string, std::string> & metadata) {
    const uint64_t length = header_length(file);
    if (length > LARGEST_HEADER) {
        fail(Status::bad_file,
             "%s: states a header of %s bytes, more than the %s that safetensors allows; the file is damaged",
             file.path().c_str(), grouped(length).c_str(), grouped(LARGEST_HEADER).c_str());
    }
    const size_t data_begin = LENGTH_BYTES + static_cast<size_t>(length);
    if (data_begin > file.size()) {
        fail(Status::bad_file,
             "%s: ends after %s bytes, inside its header of %s; the download was probably cut",
             file.path().c_str(), grouped(file.size()).c_str(), grouped(length).c_str());
    }
    const char * header = reinterpret_cast<const char *>(file.data() + LENGTH_BYTES);
    const Json   json = Json::parse({header, static_cast<size_t>(length)}, file.path() + " (header)");
    if (!json.object()) { // a header of no bytes is refused by the parser
        fail(Status::bad_file, "%s: its header is no JSON object; the file is damaged", file.path().c_str());
    }
    std::vector<StoredTensor> tensors;
    for (const JsonMember & member : *json.object()) {
        if (member.name == "__metadata__") {
            read_metadata(file, member.value, metadata);
        } else {
            tensors.push_back(Entry(file, member).read(data_begin));
        }
    }
    check_cover(file, tensors, data_begin);
    return tensors;
}

} // namespace sd
