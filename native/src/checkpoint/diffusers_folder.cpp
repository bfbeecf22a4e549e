#include "checkpoint/diffusers_folder.h"

#include "core/error.h"
#include "core/file.h"
#include "core/json.h"
#include "core/words.h"

#include <filesystem>
#include <set>

namespace sd {
namespace {

namespace fs = std::filesystem;

constexpr const char * COMPONENTS[] = {
    "unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3",
};

constexpr Json::Limits CONFIG_LIMITS = {16u << 20, 1u << 19, 64};

Json read_json(const std::string & path) {
    return Json::parse(read_text(path, CONFIG_LIMITS.bytes), path, CONFIG_LIMITS);
}

// Shards lie beside their index; anything else could name any file of the machine.
void check_shard(const std::string & index, const std::string & name) {
    if (name.empty() || name == "." || name == ".." || name.find_first_of("/\\:") != std::string::npos ||
        name.find('\0') != std::string::npos) {
        fail(Status::bad_file, "%s: names the file '%s', which is not in its own folder; refused",
             index.c_str(), printable(name).c_str());
    }
}

std::vector<std::string> shards(const std::string & folder, const std::string & index) {
    const Json   json = read_json(index);
    const Json * map = json.find("weight_map");
    if (!map || !map->object()) {
        fail(Status::bad_file, "%s: has no weight_map; the file is damaged", index.c_str());
    }
    std::set<std::string> names;
    for (const JsonMember & member : *map->object()) {
        const std::string * name = member.value.string();
        if (!name) {
            fail(Status::bad_file, "%s: '%s' in its weight_map is no file name; the file is damaged",
                 index.c_str(), printable(member.name).c_str());
        }
        check_shard(index, *name);
        names.insert(*name);
    }
    std::vector<std::string> out;
    for (const std::string & name : names) {
        out.push_back(path_in(folder, name));
        if (!is_file(out.back())) {
            fail(Status::bad_file, "%s: lists %s files, but %s is missing; the download is not complete",
                 index.c_str(), grouped(names.size()).c_str(), printable(name).c_str());
        }
    }
    return out;
}

} // namespace

bool is_folder(const std::string & path) {
    std::error_code ignored;
    return fs::is_directory(fs::u8path(path), ignored);
}

bool is_file(const std::string & path) {
    std::error_code ignored;
    return fs::is_regular_file(fs::u8path(path), ignored);
}

std::string path_in(const std::string & folder, const std::string & name) {
    return (fs::u8path(folder) / fs::u8path(name)).u8string();
}

std::vector<std::string> folder_components(const std::string & folder) {
    const std::string index = path_in(folder, "model_index.json");
    if (!is_file(index)) {
        fail(Status::bad_argument,
             "%s: is a folder without model_index.json; expected a .safetensors or .gguf file, or a "
             "diffusers folder",
             folder.c_str());
    }
    if (!read_json(index).object()) {
        fail(Status::bad_file, "%s: is no JSON object; the file is damaged", index.c_str());
    }
    std::vector<std::string> out;
    for (const char * name : COMPONENTS) {
        if (is_folder(path_in(folder, name))) {
            out.push_back(name);
        }
    }
    if (out.empty()) {
        fail(Status::bad_file,
             "%s: has a model_index.json, but neither unet nor transformer, vae or text_encoder beside it; "
             "the download is not complete",
             folder.c_str());
    }
    return out;
}

std::vector<std::string> component_files(const std::string & folder) {
    for (const char * stem : {"diffusion_pytorch_model", "model"}) {
        const std::string base = path_in(folder, stem);
        for (const char * index : {".safetensors.index.json", ".safetensors", ".fp16.safetensors",
                                   ".safetensors.index.fp16.json"}) {
            const std::string path = base + index;
            if (!is_file(path)) {
                continue;
            }
            const bool is_index = std::string(index).find(".index.") != std::string::npos;
            return is_index ? shards(folder, path) : std::vector<std::string>{path};
        }
        if (is_file(path_in(folder, stem == std::string("model") ? "pytorch_model.bin"
                                                                 : std::string(stem) + ".bin"))) {
            fail(Status::unsupported,
                 "%s: has its weights as a pickle only (.bin), which could run programs and is not "
                 "opened here; make the safetensors variant with sdcpp convert, which runs nothing",
                 folder.c_str());
        }
    }
    fail(Status::bad_file,
         "%s: has neither diffusion_pytorch_model.safetensors nor model.safetensors; the download is not "
         "complete",
         folder.c_str());
}

void read_config(const std::string & path, const std::string & prefix,
                 std::map<std::string, std::string> & metadata) {
    if (!is_file(path)) {
        return;
    }
    const Json json = read_json(path);
    if (!json.object()) {
        fail(Status::bad_file, "%s: is no JSON object; the file is damaged", path.c_str());
    }
    for (const JsonMember & member : *json.object()) {
        std::optional<std::string> value = member.value.scalar_text();
        if (const std::vector<Json> * list = member.value.array()) {
            value = "";
            for (const Json & element : *list) {
                const std::optional<std::string> scalar = element.scalar_text();
                if (!scalar) {
                    value = std::nullopt;
                    break;
                }
                *value += (value->empty() ? "" : ",") + *scalar;
            }
        }
        if (value) {
            metadata.emplace(prefix + member.name, *value);
        }
    }
}

} // namespace sd
