// Folders as diffusers saves pipelines: model_index.json and a folder per component, each with config.json
// and weights in one safetensors file or in several ("shards") that an index lists.
#pragma once

#include <map>
#include <string>
#include <vector>

namespace sd {

bool is_folder(const std::string & path);
bool is_file(const std::string & path);

// `folder` / `name`
std::string path_in(const std::string & folder, const std::string & name);

// The components with weights that a pipeline's folder has: "unet", "vae", "text_encoder", …
// Throws Error(bad_argument) where the folder is of something else.
std::vector<std::string> folder_components(const std::string & folder);

// The safetensors files with a component's weights. Throws Error where there are none.
std::vector<std::string> component_files(const std::string & folder);

// Adds what a config file holds as text under `prefix` + key: strings, numbers, booleans, lists of those.
// No file, nothing added.
void read_config(const std::string & path, const std::string & prefix,
                 std::map<std::string, std::string> & metadata);

} // namespace sd
