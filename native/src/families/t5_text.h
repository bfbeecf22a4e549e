// T5 as families use it: the tokenizer with its vocabulary, wherever that is to be had, beside the encoder.
#pragma once

#include "checkpoint/checkpoint.h"
#include "text/t5_unigram.h"

#include <string>

namespace sd {

// The vocabulary is looked for in this order: metadata of a GGUF file that holds a T5; `folder`s of the diffusers
// folder or T5 file's own folder ("tokenizer_2/spiece.model", "tokenizer_3/tokenizer.json", "spiece.model", …);
// `data_dir`/t5_spiece.model, which ships. Throws Error where there is none, or a damaged one.
T5Unigram open_t5_tokenizer(const Checkpoint & checkpoint, const std::string & data_dir);

} // namespace sd
