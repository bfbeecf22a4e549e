// Components given by files of their own: by what names files hold them, and the names that they get here.
#pragma once

#include "checkpoint/checkpoint.h"

namespace sd {

// A way to name a component's tensors. It is recognised by a name that begins with `mark`; `strip` at the
// begin of names becomes `prefix`, and names that lack it belong to something else.
struct Layout {
    const char * mark;
    const char * strip;
    const char * prefix;
};

struct Role {
    std::vector<const char *> names; // as users call it, the first in messages
    const char *              what;
    bool                      leads; // its metadata stand for the whole model
    std::vector<const char *> owns;  // prefixes of the component in any checkpoint
    std::vector<Layout>       layouts;
};

// Throws Error(bad_argument) where there is none of that name.
const Role & find_role(const std::string & name);

// Whether a tensor or a metadata value of that name belongs to the component.
bool owns(const Role & role, const std::string & name);

// Gives the tensors of a component's file the names that they would have inside a checkpoint, drops those of
// other components, and returns the prefix. Throws Error(bad_file) where `path` holds no such component.
std::string rename_component(const Role & role, std::vector<StoredTensor> & tensors,
                             const std::string & path);

// Whether a file has a denoiser without the prefix that tells components of a checkpoint apart.
bool is_bare_denoiser(const std::vector<StoredTensor> & tensors);

// Names that libraries have changed over the years, as most files spell them.
std::string usual_name(const std::string & name);

} // namespace sd
