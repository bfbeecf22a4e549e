#include "checkpoint/checkpoint.h"

#include "checkpoint/component.h"
#include "checkpoint/diffusers_folder.h"
#include "checkpoint/fp8_scales.h"
#include "checkpoint/gguf.h"
#include "checkpoint/safetensors.h"
#include "checkpoint/shards.h"
#include "core/error.h"
#include "core/words.h"

#include <algorithm>
#include <string_view>

namespace sd {
namespace {

// Says what a file is that is neither safetensors nor GGUF.
[[noreturn]] void refuse(const MappedFile & file) {
    const char * path = file.path().c_str();
    const std::string_view begin(reinterpret_cast<const char *>(file.data()),
                                 std::min<size_t>(file.size(), 64));
    const auto begins_with = [&](std::string_view text) { return begin.substr(0, text.size()) == text; };
    if (begins_with("PK\x03\x04") || (file.size() >= 2 && file.data()[0] == 0x80 && file.data()[1] <= 5)) {
        fail(Status::unsupported,
             "%s: is a pickle (.ckpt, .pt, .bin), which could run programs and is not opened here; "
             "convert it with sdcpp convert, which runs nothing",
             path);
    }
    if (begins_with("version https://git-lfs")) {
        fail(Status::bad_file, "%s: is a Git LFS pointer instead of the file itself; run git lfs pull", path);
    }
    if (begins_with("<")) {
        fail(Status::bad_file,
             "%s: is a web page instead of a model; the download needs another address, or a login", path);
    }
    fail(Status::bad_file, "%s: is neither a safetensors nor a GGUF file (%s bytes); is it a model?", path,
         grouped(file.size()).c_str());
}

} // namespace

Checkpoint Checkpoint::open(const std::string & path, const std::vector<ComponentFile> & components,
                            bool in_ram) {
    if (path.empty() && components.empty()) {
        fail(Status::bad_argument,
             "no model given; expected a .safetensors or .gguf file, or a diffusers folder");
    }
    Checkpoint out;
    out.in_ram_ = in_ram;
    out.path_ = path.empty() ? components[0].path : path;
    if (!path.empty()) {
        out.add_main();
    }
    for (const ComponentFile & component : components) {
        out.add_component(component);
    }
    take_scales(out.tensors_);
    out.build_index();
    return out;
}

const StoredTensor * Checkpoint::find(const std::string & name) const {
    const auto found = index_.find(name);
    return found != index_.end() ? &tensors_[found->second] : nullptr;
}

const StoredArray * Checkpoint::find_array(const MappedFile * file, const std::string & name) const {
    const auto found = std::find_if(arrays_.begin(), arrays_.end(), [&](const StoredArray & array) {
        return array.file == file && array.name == name;
    });
    return found != arrays_.end() ? &*found : nullptr;
}

void Checkpoint::verify_unchanged(const char * since) const {
    for (const auto & file : files_) {
        if (!file->unchanged()) {
            fail(Status::io, "%s: was changed on disk while %s", file->path().c_str(), since);
        }
    }
}

void Checkpoint::add_main() {
    if (!is_folder(path_)) {
        for (const std::string & file : shard_files(path_)) {
            std::vector<StoredTensor> tensors = read(file, metadata_);
            std::move(tensors.begin(), tensors.end(), std::back_inserter(tensors_));
        }
        if (is_bare_denoiser(tensors_)) {
            rename_component(find_role("model"), tensors_, path_);
        }
    } else {
        for (const std::string & component : folder_components(path_)) {
            const std::string folder = path_in(path_, component);
            for (const std::string & file : component_files(folder)) {
                for (StoredTensor & tensor : read(file, metadata_)) {
                    tensor.name = component + "." + tensor.name;
                    tensors_.push_back(std::move(tensor));
                }
            }
            read_config(path_in(folder, "config.json"), component + ".", metadata_);
        }
        std::map<std::string, std::string> scheduler;
        read_config(path_in(path_in(path_, "scheduler"), "scheduler_config.json"), "", scheduler);
        for (const char * key : {"prediction_type", "rescale_betas_zero_snr"}) {
            const auto stated = scheduler.find(key);
            if (stated != scheduler.end()) {
                metadata_.insert(*stated);
            }
        }
        for (const char * key : {"shift", "use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len",
                                 "max_image_seq_len", "time_shift_type"}) {
            const auto stated = scheduler.find(key);
            if (stated != scheduler.end()) {
                metadata_.emplace(std::string("scheduler.") + key, stated->second);
            }
        }
    }
    for (StoredTensor & tensor : tensors_) {
        tensor.name = usual_name(tensor.name);
    }
}

void Checkpoint::add_component(const ComponentFile & given) {
    const Role & role = find_role(given.role);
    const bool in_folder = is_folder(given.path);
    std::vector<StoredTensor> tensors;
    std::map<std::string, std::string> metadata;
    for (const std::string & file : in_folder ? component_files(given.path) : shard_files(given.path)) {
        for (StoredTensor & tensor : read(file, metadata)) {
            tensors.push_back(std::move(tensor));
        }
    }
    const std::string prefix = rename_component(role, tensors, given.path);
    if (in_folder) {
        read_config(path_in(given.path, "config.json"), prefix, metadata);
    }

    const auto replaced = [&](const StoredTensor & tensor) { return owns(role, tensor.name); };
    tensors_.erase(std::remove_if(tensors_.begin(), tensors_.end(), replaced), tensors_.end());
    std::move(tensors.begin(), tensors.end(), std::back_inserter(tensors_));

    for (auto value = metadata_.begin(); value != metadata_.end();) {
        value = owns(role, value->first) ? metadata_.erase(value) : std::next(value);
    }
    if (role.leads) {
        metadata_.swap(metadata);
    }
    metadata_.merge(metadata);
}

std::vector<StoredTensor> Checkpoint::read(const std::string & path,
                                           std::map<std::string, std::string> & metadata) {
    files_.push_back(std::make_unique<MappedFile>(path, in_ram_));
    const MappedFile & file = *files_.back();
    if (is_gguf(file)) {
        return read_gguf(file, metadata, arrays_);
    }
    if (is_safetensors(file)) {
        return read_safetensors(file, metadata);
    }
    refuse(file);
}

void Checkpoint::build_index() {
    for (size_t i = 0; i < tensors_.size(); ++i) {
        const StoredTensor & tensor = tensors_[i];
        const auto [place, is_new] = index_.emplace(tensor.name, i);
        if (!is_new) {
            fail(Status::bad_file, "%s: holds the tensor '%s', which %s holds as well; one of them has to go",
                 tensor.file->path().c_str(), printable(tensor.name).c_str(),
                 tensors_[place->second].file->path().c_str());
        }
    }
}

} // namespace sd
