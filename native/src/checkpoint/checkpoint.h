// A model's files as one table of named tensors. Files are mapped, not read, unless they may vanish; nothing is
// converted.
#pragma once

#include "core/dtype.h"
#include "core/file.h"
#include "core/tensor.h"

#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace sd {

// One tensor as it lies in its file.
struct StoredTensor {
    std::string        name; // with the component's prefix, see Checkpoint
    DType              type;
    int                dims;   // as the file states it; 0 for a scalar; beyond 4 they are folded into ne[3]
    Shape              ne;     // ggml's order; 1 beyond `dims`
    const MappedFile * file;   // owned by the checkpoint
    size_t             offset; // into the file
    size_t             bytes;
    float              scale = 1; // what the elements are multiplied by, of 8-bit floats; see fp8_scales.h

    const uint8_t * data() const { return file->data() + offset; }
};

// A list among the metadata of a GGUF file, read when it is asked for. Each kind of elements is given as what it can be
// without loss, and is empty otherwise.
struct StoredArray {
    const MappedFile * file; // owned by the checkpoint
    std::string        name;
    uint32_t           type; // GGUF's number
    uint64_t           n;
    size_t             offset; // of the first element

    std::vector<std::string> texts() const;
    std::vector<double>      numbers() const; // of integers and floats of at most 32 bits, and f64
    std::string              bytes() const;
};

// A component given apart: its role ("model" or "unet", "vae", "clip_l", "clip_g", "clip_h", "t5xxl") and its file, or its
// folder out of a diffusers folder.
struct ComponentFile {
    std::string role;
    std::string path;
};

class Checkpoint {
  public:
    // Opens `path` (a safetensors or GGUF file, or a diffusers folder) and components given apart.
    // Names stay as a single file spells them ("model.diffusion_model.…", "first_stage_model.…",
    // "cond_stage_model.…"); tensors of a diffusers folder, and of component files in that layout, are
    // prefixed by their component ("unet.", "vae.", "text_encoder."). A component given apart replaces the
    // one inside `path`; `path` may be "" where all that is needed is given apart.
    // `in_ram` reads the files into memory of our own instead of mapping them.
    // Throws Error(bad_file / unsupported / io / bad_argument / out_of_memory).
    static Checkpoint open(const std::string & path, const std::vector<ComponentFile> & components = {},
                           bool in_ram = false);

    const std::string & path() const { return path_; }

    // Null if there is none of that name.
    const StoredTensor * find(const std::string & name) const;
    bool                 has(const std::string & name) const { return find(name) != nullptr; }

    // In the order of the files.
    const std::vector<StoredTensor> & tensors() const { return tensors_; }

    // safetensors `__metadata__` and GGUF string, number and boolean values, as text. From a diffusers folder
    // the scheduler's "prediction_type", what it says of a flow's shift ("scheduler.shift"), and what the configs hold
    // ("unet.attention_head_dim"; a list of numbers as "5,10,20").
    const std::map<std::string, std::string> & metadata() const { return metadata_; }

    // Null if the file's metadata have no list of that name.
    const StoredArray * find_array(const MappedFile * file, const std::string & name) const;

    // Throws if a mapped file has become shorter or newer since it was opened: it can't be trusted then.
    // `since` ends the sentence "was changed on disk while", with the next step.
    void verify_unchanged(const char * since) const;

  private:
    void                      add_main();
    void                      add_component(const ComponentFile & given);
    std::vector<StoredTensor> read(const std::string & path, std::map<std::string, std::string> & metadata);
    void                      build_index();

    std::string                              path_;
    bool                                     in_ram_ = false;
    std::vector<std::unique_ptr<MappedFile>> files_;
    std::vector<StoredTensor>                tensors_;
    std::unordered_map<std::string, size_t>  index_;
    std::map<std::string, std::string>       metadata_;
    std::vector<StoredArray>                 arrays_;
};

} // namespace sd
