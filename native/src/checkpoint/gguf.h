// Reader of GGUF files, versions 2 and 3 (github.com/ggml-org/ggml, docs/gguf.md). Ours, because ggml's own
// holds names of at most 63 characters. The format, little endian and without padding but where stated:
//
//   "GGUF"  u32 version  u64 number of tensors  u64 number of metadata values
//   metadata value:  string key, u32 type, the value
//   string:          u64 length, bytes (UTF-8, no final 0)
//   array:           u32 type, u64 length, the elements
//   tensor:          string name, u32 dimensions, u64 per dimension (the fastest first), u32 type, u64 offset
//   padding up to a multiple of the alignment ("general.alignment", else 32), then the data
//
// Offsets count from the data's begin and are multiples of the alignment. Types are ggml's numbers.
#pragma once

#include "checkpoint/checkpoint.h"

namespace sd {

bool is_gguf(const MappedFile & file);

// All tensors in the order of the header. Adds to `metadata` what is no array, to `arrays` what is.
// Throws Error(bad_file / unsupported).
std::vector<StoredTensor> read_gguf(const MappedFile & file, std::map<std::string, std::string> & metadata,
                                    std::vector<StoredArray> & arrays);

} // namespace sd
