// Models in several files: NAME-00001-of-00003.gguf, as llama.cpp, transformers and diffusers write them.
#pragma once

#include <string>
#include <vector>

namespace sd {

// All files that the named one is one of, in order; itself alone where its name is no such. Throws Error(bad_file)
// where one of them is missing.
std::vector<std::string> shard_files(const std::string & path);

} // namespace sd
