#include "lora/lora_source.h"

#include "checkpoint/diffusers_folder.h"
#include "core/affix.h"
#include "core/error.h"
#include "core/file.h"
#include "core/words.h"
#include "lora/lora_recognise.h"

#include <algorithm>
#include <filesystem>

namespace sd {
namespace {

namespace fs = std::filesystem;

constexpr size_t MOST_TENSORS = 1'000'000;
constexpr size_t LARGEST_CONFIG = 16u << 20; // bytes
constexpr size_t LARGEST_USUAL = 1u << 30;   // bytes of a LoRA

// The file that a folder means.
std::string file_of(const std::string & path) {
    if (!is_folder(path)) {
        return path;
    }
    for (const char * name : {"adapter_model.safetensors", "pytorch_lora_weights.safetensors"}) {
        const std::string file = path_in(path, name);
        if (is_file(file)) {
            return file;
        }
    }
    for (const char * name : {"adapter_model.bin", "pytorch_lora_weights.bin"}) {
        if (is_file(path_in(path, name))) {
            fail(Status::unsupported,
                 "%s: has its LoRA as a pickle only (%s), which could run programs and is not opened here; "
                 "convert it to safetensors",
                 path.c_str(), name);
        }
    }
    fail(Status::bad_file,
         "%s: is a folder without adapter_model.safetensors or pytorch_lora_weights.safetensors",
         path.c_str());
}

// What PEFT says beside its file; "" for files of others.
std::string adapter_config_of(const std::string & file) {
    const fs::path at = fs::u8path(file);
    const fs::path config = at.parent_path() / "adapter_config.json";
    if (at.filename() != "adapter_model.safetensors" || !is_file(config.u8string())) {
        return "";
    }
    return read_text(config.u8string(), LARGEST_CONFIG);
}

// What is larger than LoRAs are is looked at before it is read whole: it is likely a model, given by mistake.
Checkpoint open_checkpoint(const std::string & path, bool in_ram) {
    std::error_code unknown;
    const uintmax_t size = fs::file_size(fs::u8path(path), unknown);
    if (in_ram && !unknown && size > LARGEST_USUAL) {
        refuse_other_kinds(Checkpoint::open(path));
    }
    return Checkpoint::open(path, {}, in_ram);
}

// Sorts keys by their stems, whatever their order in the file; those of no known suffix, and what is no
// update, go into the report.
std::map<std::string, LoraGroup> group_keys(const Checkpoint & file, LoraReport & report) {
    std::map<std::string, LoraGroup> out;
    std::vector<std::string> bundled;
    for (const StoredTensor & tensor : file.tensors()) {
        std::optional<LoraKey> key = parse_lora_key(tensor.name);
        if (!key) {
            report.unmatched.push_back(printable(tensor.name));
        } else if (key->role == LoraRole::bundled) {
            bundled.push_back(printable(tensor.name));
        } else if (key->role != LoraRole::known) {
            LoraGroup & group = out[key->stem];
            group.stem = key->stem;
            group.members.push_back({std::move(*key), &tensor});
        }
    }
    for (auto & [stem, group] : out) {
        std::sort(group.members.begin(), group.members.end(),
                  [](const auto & a, const auto & b) { return a.tensor->name < b.tensor->name; });
    }
    if (!bundled.empty()) {
        report.warnings.push_back(
            text("brings %zu tensors of textual inversions along, which are not used, first %s",
                 bundled.size(), bundled[0].c_str()));
    }
    return out;
}

} // namespace

std::string format_of(const LoraGroup & group) {
    std::string by_suffix;
    for (const LoraGroup::Member & member : group.members) {
        by_suffix = by_suffix.empty() ? member.key.format : by_suffix;
    }
    if (begins_with(group.stem, "lora_transformer_")) {
        return "onetrainer";
    }
    if (by_suffix == "lycoris" || begins_with(group.stem, "lycoris_")) {
        return "lycoris";
    }
    if (by_suffix == "xlabs" || group.stem.find("_blocks.") == std::string::npos) {
        return by_suffix.empty() ? "kohya" : by_suffix;
    }
    const bool comfy =
        begins_with(group.stem, "diffusion_model.") || begins_with(group.stem, "text_encoders.");
    return comfy ? "comfy" : by_suffix.empty() ? "plain" : by_suffix;
}

LoraSource::LoraSource(const std::string & path, LoraReport & report, bool in_ram)
    : file(open_checkpoint(file_of(path), in_ram)),
      config(file.metadata(), adapter_config_of(file.path()), file.path()) {
    if (file.tensors().size() > MOST_TENSORS) {
        fail(Status::bad_file, "%s: has %s tensors, where %s is the most that a LoRA may have", file.path().c_str(),
             grouped(file.tensors().size()).c_str(), grouped(MOST_TENSORS).c_str());
    }
    refuse_other_kinds(file);
    report.path = path;
    report.metadata = file.metadata();
    report.base_model = guess_base_model(file);
    report.warnings = config.warnings();
    groups = group_keys(file, report);
    flags_ia3 = std::any_of(groups.begin(), groups.end(), [](const auto & entry) {
        return entry.second.find(LoraRole::on_input) != nullptr;
    });
}

} // namespace sd
