#include "checkpoint/fp8_scales.h"

#include "core/error.h"
#include "core/half.h"
#include "core/json.h"
#include "core/words.h"

#include <algorithm>
#include <cmath>
#include <string_view>
#include <unordered_map>

namespace sd {
namespace {

// The name without `suffix`; "" where it does not end so.
std::string without(const std::string & name, std::string_view suffix) {
    const bool ends = name.size() > suffix.size() && name.compare(name.size() - suffix.size(), suffix.size(), suffix) == 0;
    return ends ? name.substr(0, name.size() - suffix.size()) : "";
}

bool is_f8(DType type) { return type == DType::f8_e4m3 || type == DType::f8_e5m2; }

float read_scale(const StoredTensor & scale) {
    const char * path = scale.file->path().c_str();
    const auto   name = printable(scale.name);
    if (count(scale.ne) != 1) {
        fail(Status::unsupported, "%s: '%s' has %s numbers; scales of 8-bit floats are read where a weight has one", path,
             name.c_str(), grouped(static_cast<uint64_t>(count(scale.ne))).c_str());
    }
    if (scale.type != DType::f32 && scale.type != DType::f16 && scale.type != DType::bf16) {
        fail(Status::bad_file, "%s: '%s' is of type %s, no number; the file is damaged", path, name.c_str(),
             dtype_name(scale.type));
    }
    float value;
    to_f32(scale.type, scale.data(), &value, 1);
    if (!std::isfinite(value)) {
        fail(Status::bad_file, "%s: '%s' is %g; the file is damaged", path, name.c_str(), static_cast<double>(value));
    }
    return value;
}

// ComfyUI writes {"format": "float8_e4m3fn"} as bytes.
void check_format(const StoredTensor & tensor) {
    const std::string  where = tensor.file->path() + ": '" + printable(tensor.name) + "'";
    const Json         json = Json::parse({reinterpret_cast<const char *>(tensor.data()), tensor.bytes}, where);
    const Json *       value = json.find("format");
    const std::string  format = value && value->string() ? *value->string() : "";
    if (format.rfind("float8_e", 0) != 0) {
        fail(Status::unsupported, "%s says that the weight's format is '%s'; of ComfyUI's own, 8-bit floats are read here",
             where.c_str(), printable(format).c_str());
    }
}

} // namespace

void take_scales(std::vector<StoredTensor> & tensors) {
    std::unordered_map<std::string, StoredTensor *> by_name;
    const bool any = std::any_of(tensors.begin(), tensors.end(), [](const StoredTensor & t) { return is_f8(t.type); });
    if (!any) {
        return;
    }
    for (StoredTensor & tensor : tensors) {
        by_name.emplace(tensor.name, &tensor);
    }
    const auto weight_of = [&](const StoredTensor & tensor, std::string_view suffix) -> StoredTensor * {
        const std::string place = without(tensor.name, suffix);
        const auto        found = place.empty() ? by_name.end() : by_name.find(place + ".weight");
        return found == by_name.end() ? nullptr : found->second;
    };
    std::vector<bool> dropped(tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
        const StoredTensor & tensor = tensors[i];
        for (const char * suffix : {".scale_weight", ".weight_scale"}) {
            StoredTensor * weight = weight_of(tensor, suffix);
            if (weight && is_f8(weight->type)) {
                weight->scale = read_scale(tensor);
            }
            dropped[i] = dropped[i] || weight;
        }
        if (weight_of(tensor, ".comfy_quant")) {
            check_format(tensor);
            dropped[i] = true;
        }
        const bool is_mark = tensor.name == "scaled_fp8" || !without(tensor.name, ".scaled_fp8").empty();
        dropped[i] = dropped[i] || is_mark || weight_of(tensor, ".scale_input") || weight_of(tensor, ".input_scale");
    }
    size_t kept = 0;
    for (size_t i = 0; i < tensors.size(); ++i) {
        if (!dropped[i]) {
            std::swap(tensors[kept++], tensors[i]);
        }
    }
    tensors.resize(kept);
}

} // namespace sd
