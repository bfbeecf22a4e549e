// The networks that a family needs beside its denoiser: all that are missing are told of at once.
#pragma once

#include "checkpoint/checkpoint.h"

#include <initializer_list>
#include <vector>

namespace sd {

struct NeededComponent {
    const char *              argument; // by which a file with it can be given
    std::vector<const char *> any_of;   // tensors; it is there where one of them is
};

// Throws Error(bad_file) naming the missing ones.
void check_components(const Checkpoint & file, const char * family, std::initializer_list<NeededComponent> needed);

// The autoencoder, in either layout.
NeededComponent needed_vae();

} // namespace sd
