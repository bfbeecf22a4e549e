#include "checkpoint/gguf.h"

#include "checkpoint/shape.h"
#include "core/error.h"
#include "core/half.h"
#include "core/utf8.h"
#include "core/words.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <unordered_map>
#include <unordered_set>

namespace sd {
namespace {

constexpr uint64_t LONGEST_NAME = 65535;
constexpr uint64_t LONGEST_KEPT_TEXT = 1 << 20; // longer values describe nothing that we need
constexpr int      DEEPEST_ARRAY = 4;
constexpr uint32_t MOST_DIMS = 4;

enum class ValueType : uint32_t { u8, i8, u16, i16, u32, i32, f32, boolean, string, array, u64, i64, f64 };

// Bytes per value; 0 where they vary.
constexpr uint64_t WIDTHS[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};

// Walks over the header; every step is checked against the file's end.
class Cursor {
  public:
    explicit Cursor(const MappedFile & file, uint64_t at = 0) : file_(file), at_(at) {}

    const MappedFile & file() const { return file_; }
    uint64_t           at() const { return at_; }
    uint64_t           left() const { return file_.size() - at_; }

    [[noreturn]] void wrong(const std::string & what) const {
        fail(Status::bad_file, "%s: %s (at byte %s); the file is damaged", file_.path().c_str(), what.c_str(),
             grouped(at_).c_str());
    }

    const uint8_t * take(uint64_t bytes) {
        if (bytes > left()) {
            fail(Status::bad_file,
                 "%s: ends after %s bytes, inside its header; the download was probably cut",
                 file_.path().c_str(), grouped(file_.size()).c_str());
        }
        const uint8_t * out = file_.data() + at_;
        at_ += bytes;
        return out;
    }

    uint64_t number(uint64_t bytes) {
        const uint8_t * from = take(bytes);
        uint64_t        out = 0;
        for (uint64_t i = 0; i < bytes; ++i) {
            out |= static_cast<uint64_t>(from[i]) << (8 * i);
        }
        return out;
    }

    uint32_t u32() { return static_cast<uint32_t>(number(4)); }
    uint64_t u64() { return number(8); }

    std::string_view string() {
        const uint64_t length = u64();
        return {reinterpret_cast<const char *>(take(length)), static_cast<size_t>(length)};
    }

    std::string name(const char * what) {
        const uint64_t length = u64();
        if (length > LONGEST_NAME) {
            wrong(text("a %s of %s bytes, where %s are allowed", what, grouped(length).c_str(),
                       grouped(LONGEST_NAME).c_str()));
        }
        const std::string_view out(reinterpret_cast<const char *>(take(length)), static_cast<size_t>(length));
        if (!is_utf8(out)) {
            wrong(text("the %s '%s' is not UTF-8", what, printable(out).c_str()));
        }
        return std::string(out);
    }

    // A number of things that take at least so many bytes each.
    uint64_t count(const char * what, uint64_t at_least) {
        const uint64_t out = u64();
        if (out > left() / at_least) {
            fail(Status::bad_file,
                 "%s: %s %s cannot be in the %s bytes that follow; the file is damaged, or the download was "
                 "cut",
                 file_.path().c_str(), grouped(out).c_str(), what, grouped(left()).c_str());
        }
        return out;
    }

    ValueType type() {
        const uint32_t out = u32();
        if (out > static_cast<uint32_t>(ValueType::f64)) {
            wrong(text("a metadata value of the unknown type %u", out));
        }
        return static_cast<ValueType>(out);
    }

  private:
    const MappedFile & file_;
    uint64_t           at_;
};

uint64_t width(ValueType type) { return WIDTHS[static_cast<uint32_t>(type)]; }

// Tokenizers have arrays of 100,000 strings; they are read where one is needed.
void skip_array(Cursor & cursor, int depth) {
    if (depth > DEEPEST_ARRAY) {
        cursor.wrong("arrays inside arrays inside arrays");
    }
    const ValueType type = cursor.type();
    if (width(type) > 0) {
        cursor.take(cursor.count("array elements", width(type)) * width(type));
        return;
    }
    const uint64_t shortest = type == ValueType::string ? 8 : 12;
    const uint64_t elements = cursor.count("array elements", shortest);
    for (uint64_t i = 0; i < elements; ++i) {
        if (type == ValueType::string) {
            cursor.string();
        } else {
            skip_array(cursor, depth + 1);
        }
    }
}

double double_of_bits(uint64_t bits) {
    double out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

// The value in writing; nothing for arrays and for texts that are not kept.
std::optional<std::string> read_value(Cursor & cursor, ValueType type) {
    switch (type) {
    case ValueType::string: {
        const std::string_view out = cursor.string();
        return out.size() <= LONGEST_KEPT_TEXT && is_utf8(out) ? std::optional<std::string>(out)
                                                               : std::nullopt;
    }
    case ValueType::array: skip_array(cursor, 1); return std::nullopt;
    case ValueType::boolean: return cursor.number(1) ? "true" : "false";
    case ValueType::f32: return number_text(float_of_bits(cursor.u32()));
    case ValueType::f64: return number_text(double_of_bits(cursor.u64()));
    case ValueType::i8: return std::to_string(static_cast<int8_t>(cursor.number(1)));
    case ValueType::i16: return std::to_string(static_cast<int16_t>(cursor.number(2)));
    case ValueType::i32: return std::to_string(static_cast<int32_t>(cursor.number(4)));
    case ValueType::i64: return std::to_string(static_cast<int64_t>(cursor.number(8)));
    default: return std::to_string(cursor.number(width(type)));
    }
}

// What the metadata say about the data's alignment goes into `alignment`.
void read_metadata(Cursor & cursor, uint64_t values, std::map<std::string, std::string> & metadata,
                   std::vector<StoredArray> & arrays, uint64_t & alignment) {
    std::unordered_set<std::string> seen;
    for (uint64_t i = 0; i < values; ++i) {
        const std::string key = cursor.name("metadata key");
        if (!seen.insert(key).second) {
            cursor.wrong("the metadata key '" + printable(key) + "' stands twice");
        }
        const ValueType type = cursor.type();
        if (type == ValueType::array) {
            Cursor         ahead = cursor;
            const uint32_t element = ahead.u32();
            const uint64_t n = ahead.u64();
            arrays.push_back({&cursor.file(), key, element, n, static_cast<size_t>(ahead.at())});
        }
        if (key == "general.alignment") {
            alignment = type == ValueType::u32 ? cursor.u32() : 0;
            if (alignment == 0 || (alignment & (alignment - 1)) != 0) {
                cursor.wrong("general.alignment is no power of two in 32 bits");
            }
        } else if (std::optional<std::string> value = read_value(cursor, type)) {
            metadata.emplace(key, std::move(*value));
        }
    }
}

// `offset` still counts from the data's begin.
StoredTensor read_tensor(Cursor & cursor, uint64_t alignment) {
    StoredTensor tensor{};
    tensor.file = &cursor.file();
    tensor.name = cursor.name("tensor name");
    const std::string shown = "tensor '" + printable(tensor.name) + "' ";
    const uint32_t    dims = cursor.u32();
    if (dims > MOST_DIMS) {
        cursor.wrong(shown + text("has %u dimensions, where %u are allowed", dims, MOST_DIMS));
    }
    std::vector<uint64_t> lengths;
    for (uint32_t i = 0; i < dims; ++i) {
        lengths.push_back(cursor.u64());
    }
    const uint32_t    type = cursor.u32();
    const DTypeInfo * info =
        type < static_cast<uint32_t>(DType::f8_e4m3) ? dtype_info(static_cast<int32_t>(type)) : nullptr;
    if (!info) {
        fail(Status::unsupported,
             "%s: %shas type number %u, which is not known here; the file may be damaged, or newer than this "
             "program",
             cursor.file().path().c_str(), shown.c_str(), type);
    }
    tensor.type = info->type;
    if (!set_shape(tensor, lengths)) {
        cursor.wrong(shown + "of type " + info->name + " has the impossible shape " + shape_text(lengths));
    }
    const uint64_t offset = cursor.u64();
    if (offset % alignment != 0 || offset > static_cast<uint64_t>(INT64_MAX) - tensor.bytes) {
        cursor.wrong(shown + "has the offset " + grouped(offset) + ", no multiple of the alignment " +
                     grouped(alignment));
    }
    tensor.offset = static_cast<size_t>(offset);
    return tensor;
}

// ComfyUI-GGUF quantises tensors whose rows are no whole blocks as if they had other rows, and keeps their shape, the
// slowest dimension first, in the metadata.
void take_original_shapes(std::vector<StoredTensor> & tensors, const MappedFile & file,
                          const std::vector<StoredArray> & arrays) {
    constexpr std::string_view                            KEY = "comfy.gguf.orig_shape.";
    constexpr uint64_t                                    MOST = 16; // dimensions
    std::unordered_map<std::string, const StoredArray *> shapes;
    for (const StoredArray & array : arrays) {
        if (array.file == &file && array.name.compare(0, KEY.size(), KEY) == 0) {
            shapes.emplace(array.name.substr(KEY.size()), &array);
        }
    }
    for (StoredTensor & tensor : tensors) {
        const auto found = shapes.find(tensor.name);
        if (found == shapes.end()) {
            continue;
        }
        const std::vector<double> lengths = found->second->n <= MOST ? found->second->numbers() : std::vector<double>();
        std::vector<uint64_t>     turned;
        for (auto length = lengths.rbegin(); length != lengths.rend(); ++length) {
            turned.push_back(*length >= 1 && *length < 0x1p53 ? static_cast<uint64_t>(*length) : 0);
        }
        StoredTensor as_bytes = tensor;
        as_bytes.type = DType::u8; // which any shape is possible for
        if (!set_shape(as_bytes, turned) || count(as_bytes.ne) != count(tensor.ne)) {
            fail(Status::bad_file, "%s: tensor '%s' has %s elements, but its shape is said to have been %s; the file is damaged",
                 file.path().c_str(), printable(tensor.name).c_str(),
                 grouped(static_cast<uint64_t>(count(tensor.ne))).c_str(), shape_text(turned).c_str());
        }
        tensor.dims = as_bytes.dims;
        tensor.ne = as_bytes.ne;
    }
}

void check_placement(const MappedFile & file, const std::vector<StoredTensor> & tensors) {
    std::vector<const StoredTensor *> order;
    for (const StoredTensor & tensor : tensors) {
        if (tensor.bytes > 0) {
            order.push_back(&tensor);
        }
    }
    std::sort(order.begin(), order.end(),
              [](const StoredTensor * a, const StoredTensor * b) { return a->offset < b->offset; });
    for (size_t i = 1; i < order.size(); ++i) {
        if (order[i]->offset < order[i - 1]->offset + order[i - 1]->bytes) {
            fail(Status::bad_file, "%s: the data of '%s' and '%s' overlap; the file is damaged",
                 file.path().c_str(), printable(order[i - 1]->name).c_str(),
                 printable(order[i]->name).c_str());
        }
    }
    const size_t end = order.empty() ? 0 : order.back()->offset + order.back()->bytes;
    if (end > file.size()) {
        fail(Status::bad_file, "%s: ends after %s of %s bytes; the download was probably cut",
             file.path().c_str(), grouped(file.size()).c_str(), grouped(end).c_str());
    }
}

void check_version(const MappedFile & file, uint32_t version) {
    const char * path = file.path().c_str();
    if (version != 0 && (version & 0xffff) == 0) {
        fail(Status::unsupported, "%s: is a big-endian GGUF file; convert it with gguf-convert-endian", path);
    }
    if (version == 1) {
        fail(Status::unsupported, "%s: is a GGUF file of version 1, of 2023; convert the model again", path);
    }
    if (version != 2 && version != 3) {
        fail(Status::unsupported, "%s: is a GGUF file of version %u; versions 2 and 3 are read here", path,
             version);
    }
}

} // namespace

std::vector<std::string> StoredArray::texts() const {
    std::vector<std::string> out;
    Cursor                   cursor(*file, offset);
    for (uint64_t i = 0; i < n && static_cast<ValueType>(type) == ValueType::string; ++i) {
        out.emplace_back(cursor.string());
    }
    return out;
}

std::vector<double> StoredArray::numbers() const {
    std::vector<double> out;
    Cursor              cursor(*file, offset);
    for (uint64_t i = 0; i < n; ++i) {
        switch (static_cast<ValueType>(type)) {
        case ValueType::u8: out.push_back(static_cast<double>(cursor.number(1))); break;
        case ValueType::i8: out.push_back(static_cast<int8_t>(cursor.number(1))); break;
        case ValueType::u16: out.push_back(static_cast<double>(cursor.number(2))); break;
        case ValueType::i16: out.push_back(static_cast<int16_t>(cursor.number(2))); break;
        case ValueType::u32: out.push_back(cursor.u32()); break;
        case ValueType::i32: out.push_back(static_cast<int32_t>(cursor.u32())); break;
        case ValueType::f32: out.push_back(static_cast<double>(float_of_bits(cursor.u32()))); break;
        case ValueType::f64: out.push_back(double_of_bits(cursor.u64())); break;
        default: return {};
        }
    }
    return out;
}

std::string StoredArray::bytes() const {
    const auto kind = static_cast<ValueType>(type);
    if (kind != ValueType::u8 && kind != ValueType::i8) {
        return "";
    }
    return {reinterpret_cast<const char *>(Cursor(*file, offset).take(n)), static_cast<size_t>(n)};
}

bool is_gguf(const MappedFile & file) { return file.size() >= 4 && std::memcmp(file.data(), "GGUF", 4) == 0; }

std::vector<StoredTensor> read_gguf(const MappedFile & file, std::map<std::string, std::string> & metadata,
                                    std::vector<StoredArray> & arrays) {
    Cursor cursor(file);
    cursor.take(4);
    check_version(file, cursor.u32());
    const uint64_t n_tensors = cursor.count("tensors", 24);
    const uint64_t n_values = cursor.count("metadata values", 13);
    uint64_t       alignment = 32;
    read_metadata(cursor, n_values, metadata, arrays, alignment);

    std::vector<StoredTensor>       tensors;
    std::unordered_set<std::string> seen;
    for (uint64_t i = 0; i < n_tensors; ++i) {
        tensors.push_back(read_tensor(cursor, alignment));
        if (!seen.insert(tensors.back().name).second) {
            cursor.wrong("the tensor '" + printable(tensors.back().name) + "' stands twice");
        }
    }
    const uint64_t data_begin = (cursor.at() + alignment - 1) / alignment * alignment;
    for (StoredTensor & tensor : tensors) {
        tensor.offset += data_begin; // no overflow: its offset and bytes are below 2⁶³ together
    }
    check_placement(file, tensors);
    take_original_shapes(tensors, file, arrays);
    return tensors;
}

} // namespace sd
