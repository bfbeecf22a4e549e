// Reader of safetensors files. The format (github.com/huggingface/safetensors, README):
//
//   8 bytes     length N of the header, unsigned, little endian
//   N bytes     the header: JSON in UTF-8 that begins with '{' and may end in spaces; at most 100 MB
//   the rest    the data
//
// The header maps a tensor's name to {"dtype": "F16", "shape": [2, 3], "data_offsets": [begin, end]}. Offsets
// count from the data's begin; shapes have the slowest dimension first, [] is a scalar, a length may be 0.
// "__metadata__" maps strings to strings. Names are unique. Tensors cover the data without holes or overlaps,
// in any order; nothing is aligned.
#pragma once

#include "checkpoint/checkpoint.h"

namespace sd {

// Whether a file looks like safetensors; it may still be damaged.
bool is_safetensors(const MappedFile & file);

// All tensors in the order of their data. Adds to `metadata`. Throws Error(bad_file / unsupported).
std::vector<StoredTensor> read_safetensors(const MappedFile & file,
                                           std::map<std::string, std::string> & metadata);

} // namespace sd
