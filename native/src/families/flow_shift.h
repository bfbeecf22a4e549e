// The shift of a rectified flow's noise levels: what a diffusers folder's scheduler_config.json says, else the family's own.
#pragma once

#include "checkpoint/checkpoint.h"

namespace sd {

// A fixed shift, or one that grows with the picture: its logarithm is linear in the number of squares of 2 x 2 cells,
// `base` at `base_squares` and `most` at `most_squares` (https://github.com/black-forest-labs/flux,
// src/flux/sampling.py, get_schedule).
struct FlowShift {
    double fixed;
    bool   grows = false;
    double base = 0.5, most = 1.15, base_squares = 256, most_squares = 4096;

    // Keys of FlowMatchEulerDiscreteScheduler replace what `usual` has. Throws Error(bad_file / unsupported) for
    // numbers without sense.
    static FlowShift read(const Checkpoint & checkpoint, FlowShift usual);

    double of(double squares) const;
};

} // namespace sd
